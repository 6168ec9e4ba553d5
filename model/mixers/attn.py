"""Grouped-query softmax attention with output gate, q/k norm, partial rotary and window (Qwen3-Next)."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from kernels.attention import attention
from model.linear import Linear, RMSNorm
from model.mixer import Context, Flops, Mixer, MixerConfig, Sequence, Split


class AttnConfig(MixerConfig):
    """Fields of grouped-query softmax attention."""

    kind: Literal["attn"] = "attn"
    num_heads: int = Field(ge=1)
    num_key_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    rotary_dim: int = Field(ge=0)
    rotary_theta: float = Field(gt=1)
    window: int | None = Field(ge=1)
    has_qk_norm: bool
    has_output_gate: bool
    norm_eps: float = Field(gt=0, lt=1)
    has_zero_centered_norm: bool

    @model_validator(mode="after")
    def _fits(self) -> "AttnConfig":
        heads, key_heads = self.num_heads, self.num_key_heads
        if heads % key_heads:
            raise ValueError(f"num_heads {heads} must be a multiple of num_key_heads {key_heads}")
        rotary, head = self.rotary_dim, self.head_dim
        if rotary % 2 or rotary > head:
            raise ValueError(f"rotary_dim {rotary} must be even and at most head_dim {head}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Attn":
        """The module; all layers are alike."""
        return Attn(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _parts(self) -> tuple[int, int, int, int]:
        queries, keys = self.num_heads * self.head_dim, self.num_key_heads * self.head_dim
        return queries, queries * self.has_output_gate, keys, keys

    def count_params(self, width: int) -> int:
        """Projections, and the two norms of a head."""
        return width * (sum(self._parts()) + self._parts()[0]) + 2 * self.head_dim * self.has_qk_norm

    def flops(self, width: int, context: int) -> Flops:
        """Scores and weighted values over the keys that a query sees on average."""
        window = min(self.window or context, context)
        keys = window - window * (window - 1) / (2 * context)
        core = 4 * self.num_heads * self.head_dim * keys
        return Flops(2 * width * (sum(self._parts()) + self._parts()[0]), core)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Keys and values of the tokens that later queries can still see."""
        kept = min(self.window or context, context)
        return 2 * self.num_key_heads * self.head_dim * kept * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, their normed copies, output, log-sum-exp and gate."""
        queries, gate, keys, values = self._parts()
        normed = (queries + keys) * self.has_qk_norm
        return element_bytes * (2 * queries + 2 * gate + keys + values + normed) + 4 * self.num_heads

    def roles(self, width: int) -> Mapping[str, Split]:
        """Heads are the unit; a key head is shared by its group of query heads."""
        roles = {
            "in_proj.weight": Split(0, "heads", self._parts()),
            "out_proj.weight": Split(1, "heads"),
        }
        norms = {"q_norm.weight": Split(None), "k_norm.weight": Split(None)}
        return roles | norms if self.has_qk_norm else roles

    @property
    def context(self) -> Context:
        """Keys and values are gathered; with a window the left neighbour's tail is enough."""
        return Context("gather", 0 if self.window is None else self.window - 1)


class Attn(Mixer):
    """Softmax attention; one projection makes queries, gates, keys and values."""

    def __init__(self, config: AttnConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.out_proj = Linear(self.parts[0], width, out_std)
        if config.has_qk_norm:
            is_zero_centered = config.has_zero_centered_norm
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, is_zero_centered=is_zero_centered)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, is_zero_centered=is_zero_centered)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """Queries see the keys of their own document, up to themselves and inside the window."""
        config = self.config
        q, gate, k, v = self.in_proj(x).split(self.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in (q, k, v))
        if config.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta)
            q, k = rotate(q, *table), rotate(k, *table)
        out = attention(
            q, k, v, scale=config.head_dim**-0.5, window=config.window, document=sequence.document
        ).flatten(-2)
        if config.has_output_gate:
            out = out * gate.sigmoid()
        return self.out_proj(out)


def rotate(
    x: Float[Tensor, "B T H K"], cos: Float[Tensor, "B T R"], sin: Float[Tensor, "B T R"]
) -> Float[Tensor, "B T H K"]:
    """x with its first 2 R dims turned by the angles; dim m pairs with dim m + R (half-split rotary)."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    first, second, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
