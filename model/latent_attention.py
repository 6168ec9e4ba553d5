"""Latent attention of any kind: queries, keys and values of small latents (DeepSeek-V2, 2405.04434)."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from kernels.rotary import RotaryLayout, rotate
from model.linear import Linear, RMSNorm
from model.mixer import Flops, Mixer, MixerConfig, Sequence, TPShard
from model.rotary import RotaryScaling
from model.sequence_sharding import AttentionView


class LatentConfig(MixerConfig):
    """Fields of every attention over a latent."""

    sharded_fields = ("num_heads",)
    num_heads: int = Field(ge=1)
    query_latent_dim: int | None = Field(ge=1)
    latent_dim: int = Field(ge=1)
    key_dim: int = Field(ge=1)
    shared_key_dim: int = Field(ge=0)
    value_dim: int = Field(ge=1)
    rotary_dim: int = Field(ge=0)
    rotary_theta: float = Field(gt=1)
    rotary_layout: RotaryLayout
    rotary_scaling: RotaryScaling
    latent_eps: float = Field(gt=0, lt=1)
    has_zero_centered_norm: bool
    has_latent_scale: bool

    @model_validator(mode="after")
    def _rotary_fits(self) -> "LatentConfig":
        rotary, shared = self.rotary_dim, self.shared_key_dim
        if rotary % 2 or rotary > shared:
            raise ValueError(f"rotary_dim {rotary} must be even and at most shared_key_dim {shared}")
        if self.has_latent_scale and self.query_latent_dim is None:
            raise ValueError("has_latent_scale needs a query_latent_dim")
        return self

    @property
    def head_dim(self) -> int:
        """Dim of a query."""
        return self.key_dim + self.shared_key_dim

    @property
    def scale(self) -> float:
        """Factor on scores."""
        return self.head_dim**-0.5 * self.rotary_scaling.softmax_factor

    def _down(self) -> tuple[int, int, int]:
        # What is made of the input: query latent, key and value latent, the key part that heads share.
        return self.query_latent_dim or 0, self.latent_dim, self.shared_key_dim

    def _queries(self) -> int:
        return self.num_heads * self.head_dim

    def _up(self) -> tuple[int, int]:
        return self.num_heads * self.key_dim, self.num_heads * self.value_dim

    def _weights(self, width: int) -> int:
        inputs = self.query_latent_dim or width
        matrices = width * sum(self._down()) + inputs * self._queries() + self.latent_dim * sum(self._up())
        return matrices + self._up()[1] * width

    def count_params(self, width: int) -> int:
        """Projections and the norms of the latents."""
        return self._weights(width) + sum(self._down()[:2])

    def flops(self, width: int, context: int) -> Flops:
        """Scores and weighted values over half the context on average."""
        core = 2 * self.num_heads * (self.head_dim + self.value_dim) * (context + 1) / 2
        return Flops(2 * self._weights(width), core)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """The latent and the shared key of every token."""
        return (self.latent_dim + self.shared_key_dim) * context * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """What reading keeps, the normed latent, keys before and with their shared part, values, output."""
        kept = self.latent_dim + self._queries() + sum(self._up()) + self._up()[1]
        return self._read_bytes(element_bytes) + element_bytes * kept + 4 * self.num_heads

    def _read_bytes(self, element_bytes: int) -> int:
        """Latents before their norms, the one of the queries after it, queries, statistics of the norms."""
        query_latent = self.query_latent_dim or 0
        kept = sum(self._down()) + query_latent + self._queries()
        return element_bytes * kept + 4 * (1 + (query_latent > 0))

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; every rank keeps the latents whole."""
        tp_plan = {
            "down_proj.weight": TPShard(None),
            "q_proj.weight": TPShard(0),
            "kv_norm.weight": TPShard(None),
            "kv_proj.weight": TPShard(0, self._up()),
            "out_proj.weight": TPShard(1),
        }
        return tp_plan if self.query_latent_dim is None else tp_plan | {"q_norm.weight": TPShard(None)}

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Latents and shared keys are gathered."""
        return "gather"


class Latents(NamedTuple):
    """What a latent attention works on.

    q_latent is what the queries are made of: the normed latent, or x. kv_latent is normed. shared_key is the
    rotated part of the keys that heads share.
    """

    q_latent: Float[Tensor, "B T R"]
    q: Float[Tensor, "B T H K"]
    kv_latent: Float[Tensor, "B T L"]
    shared_key: Float[Tensor, "B T 1 S"]


class LatentMixer(Mixer):
    """The projections of a latent attention; a subclass mixes."""

    fusible = ("_latents",)

    def __init__(self, config: LatentConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.latent, self.width = config, width
        query_dim, kv_dim, _ = config._down()
        is_zero_centered = config.has_zero_centered_norm
        self.down_proj = Linear(width, sum(config._down()), init_std)
        if query_dim:
            self.q_norm = RMSNorm(query_dim, config.latent_eps, is_zero_centered=is_zero_centered)
        self.q_proj = Linear(query_dim or width, config._queries(), init_std)
        self.kv_norm = RMSNorm(kv_dim, config.latent_eps, is_zero_centered=is_zero_centered)
        self.kv_proj = Linear(kv_dim, sum(config._up()), init_std)
        self.out_proj = Linear(config._up()[1], width, out_std)

    def latents(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Latents:
        """Queries, latents and shared keys, normed and rotated."""
        config, table = self.latent, None
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta, config.rotary_scaling)
        return self._latents(x, table)

    def _latents(self, x: Float[Tensor, "B T D"], table: tuple[Tensor, Tensor] | None) -> Latents:
        config = self.latent
        q_latent, kv_latent, shared = self.down_proj(x).split(config._down(), dim=-1)
        q_latent = self.q_norm(q_latent) if config.query_latent_dim else x
        q = self.q_proj(q_latent).unflatten(-1, (config.num_heads, -1))
        kv_latent, shared = self.kv_norm(kv_latent), shared[:, :, None]
        if config.has_latent_scale:
            # As large as from a latent of the full width (LongCat-Flash).
            q = q * (self.width / q_latent.shape[-1]) ** 0.5
            kv_latent = kv_latent * (self.width / config.latent_dim) ** 0.5
        if table is not None:
            own, turned = q.split([config.key_dim, config.shared_key_dim], dim=-1)
            q = torch.cat([own, rotate(turned, *table, config.rotary_layout)], dim=-1)
            shared = rotate(shared, *table, config.rotary_layout)
        return Latents(q_latent, q, kv_latent, shared)

    def keys_values(
        self, latents: Latents, view: AttentionView
    ) -> tuple[Float[Tensor, "B S H K"], Float[Tensor, "B S H V"]]:
        """The keys and values of each head; latents travel, and every rank makes keys of them."""
        keys, values = self.kv_proj(view.keys(latents.kv_latent)).split(self.latent._up(), dim=-1)
        keys, values = (part.unflatten(-1, (self.latent.num_heads, -1)) for part in (keys, values))
        shared = view.keys(latents.shared_key).expand(-1, -1, keys.shape[2], -1)
        return torch.cat([keys, shared], dim=-1), values
