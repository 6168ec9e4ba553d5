"""Attention whose one key is its value too: projections, compressor, inverse rotation (DeepSeek-V4)."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.compress import gated_compress
from kernels.compressed_attention import joint_attention
from kernels.document_windows import Windows
from kernels.norm import rms_norm
from kernels.rotary import rotate
from model.linear import Initial, Linear, RMSNorm
from model.mixer import Flops, Mixer, MixerConfig, Sequence, TPShard
from model.rotary import RotaryScaling, rotary_table
from model.sequence_sharding import Compression


class SharedKeyConfig(MixerConfig):
    """Fields of attention with one shared key, low-rank queries and a grouped low-rank output."""

    sharded_fields = ("num_heads", "output_groups")
    num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    query_rank: int = Field(ge=1)
    output_groups: int = Field(ge=1)
    output_rank: int = Field(ge=1)
    rotary_dim: int = Field(ge=2)
    rotary_theta: float = Field(gt=1)
    rotary_scaling: RotaryScaling
    window: int = Field(ge=1)
    norm_eps: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> "SharedKeyConfig":
        if self.num_heads % self.output_groups:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of output_groups {self.output_groups}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even and at most {self.head_dim}")
        return self

    @abstractmethod
    def _extra_params(self, width: int) -> tuple[int, int]:
        """Parameters beyond those of the window: in projections of each token, and others."""

    @abstractmethod
    def _extra_core(self, context: int) -> float:
        """Operations per token beyond those of the window."""

    def _base_projections(self, width: int) -> int:
        size = self.num_heads * self.head_dim
        joined = width * (self.query_rank + self.head_dim) + self.query_rank * size
        return joined + size * self.output_rank + self.output_groups * self.output_rank * width

    def count_params(self, width: int) -> int:
        """Projections, norms of the query latent and of the key, sinks, and what compression adds."""
        small = self.query_rank + self.head_dim + self.num_heads
        return self._base_projections(width) + small + sum(self._extra_params(width))

    def flops(self, width: int, context: int) -> Flops:
        """Scores and weighted values of the window and of the entries."""
        window = min(self.window, context)
        keys = window - window * (window - 1) / (2 * context)
        core = 4 * self.num_heads * self.head_dim * keys + self._extra_core(context)
        return Flops(2 * (self._base_projections(width) + self._extra_params(width)[0]), core)

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Queries before and after norm and rotary, outputs, latents, keys, and what compression keeps."""
        size, latent = self.num_heads * self.head_dim, self.output_groups * self.output_rank
        kept = 4 * size + latent + 2 * self.query_rank + 2 * self.head_dim
        statistics = 8 * self.num_heads + 8
        # The tables of the output's rotation are the layer's own.
        return element_bytes * kept + statistics + 2 * self.rotary_dim + self._extra_bytes(element_bytes)

    @abstractmethod
    def _extra_bytes(self, element_bytes: int) -> int:
        """Bytes per token kept for backward beyond those of the window."""

    def _entry_bytes(self, dim: int, element_bytes: int) -> int:
        """Of one entry: before and after its norm, gates' sums, the tables of its rotation, statistics."""
        return 2 * element_bytes * dim + 4 * dim + 4 * self.rotary_dim + 4

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Groups of heads that share an output latent are the unit; the key is every rank's."""
        return {
            "in_proj.weight": TPShard(None),
            "q_norm.weight": TPShard(None),
            "q_proj.weight": TPShard(0),
            "kv_norm.weight": TPShard(None),
            "sinks": TPShard(0),
            "group_proj.weight": TPShard(0),
            "out_proj.weight": TPShard(1),
        }

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Entries of all ranks are gathered, and index keys where there are some."""
        return "gather"


def compressor_tp_plan(name: str) -> dict[str, TPShard]:
    """Copies on every rank."""
    return {f"{name}.{part}": TPShard(None) for part in ("in_proj.weight", "bias", "norm.weight")}


class Compressor(nn.Module):
    """One normed and rotated entry for each complete window of tokens, by gates per channel."""

    def __init__(
        self,
        config: SharedKeyConfig,
        width: int,
        dim: int,
        size: int,
        init_std: float,
        *,
        is_overlapping: bool,
    ) -> None:
        super().__init__()
        self.config, self.is_overlapping = config, is_overlapping
        channels = dim * (1 + is_overlapping)
        self.in_proj = Linear(width, 2 * channels, init_std)
        self.bias = nn.Parameter(torch.empty(size, channels))
        self.norm = RMSNorm(dim, config.norm_eps, is_zero_centered=False)
        self.initial = {"bias": Initial("constant", 0.0, is_float32=True)}

    def forward(self, x: Float[Tensor, "B T D"], made: Compression) -> Float[Tensor, "B N K"]:
        """Entries by slot of whole rows; an entry stands at the position of its window's first token."""
        values, gates = made.tokens(self.in_proj(x)).chunk(2, dim=-1)
        windows, position = made.local, made.position
        entries = gated_compress(
            values, gates, self.bias, windows, position=position, is_overlapping=self.is_overlapping
        )
        config, last = self.config, position.shape[1] - 1
        at = position.gather(1, windows.start.clamp(max=last))
        table = rotary_table(at, config.rotary_dim, config.rotary_theta, config.rotary_scaling)
        entries = rotate(self.norm(entries)[:, :, None], *table, "interleaved", on_last=True)[:, :, 0]
        return made.entries(entries)


class SharedKeyMixer(Mixer):
    """What all forms share: latents, queries, key, inverse rotation and the grouped output."""

    fusible = ("_read", "_write")

    def __init__(self, config: SharedKeyConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.shared, self.scale = config, config.head_dim**-0.5
        size = config.num_heads * config.head_dim
        self.in_proj = Linear(width, config.query_rank + config.head_dim, init_std)
        self.q_norm = RMSNorm(config.query_rank, config.norm_eps, is_zero_centered=False)
        self.q_proj = Linear(config.query_rank, size, init_std)
        self.kv_norm = RMSNorm(config.head_dim, config.norm_eps, is_zero_centered=False)
        self.sinks = nn.Parameter(torch.empty(config.num_heads))
        groups, rank = config.output_groups, config.output_rank
        self.group_proj = Linear(size // groups, groups * rank, init_std)
        self.out_proj = Linear(groups * rank, width, out_std)
        self.initial = {"sinks": Initial("constant", 0.0, is_float32=True)}

    def _read(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The query latent, rotated queries [B T H K] and the rotated key [B T K]."""
        config = self.shared
        latent, kv = self.in_proj(x).split([config.query_rank, config.head_dim], dim=-1)
        latent = self.q_norm(latent)
        q = self.q_proj(latent).unflatten(-1, (-1, config.head_dim))
        # Queries are normed per head without a weight.
        q = rms_norm(q, torch.ones_like(self.kv_norm.weight), config.norm_eps)
        q = rotate(q, *table, "interleaved", on_last=True)
        kv = rotate(self.kv_norm(kv)[:, :, None], *table, "interleaved", on_last=True)[:, :, 0]
        return latent, q, kv

    def _near(
        self, kv: Float[Tensor, "B T K"], sequence: Sequence
    ) -> tuple[Float[Tensor, "B S K"], Int[Tensor, "B T"] | None]:
        """Raw keys, each chunk behind those of the window before it, and where queries stand there."""
        view = sequence.view(self.shared.window - 1)
        keys, q_index = view.keys(kv), view.q_index
        if q_index is None:
            return keys, None
        chunk = torch.arange(keys.shape[0], device=kv.device) % (keys.shape[0] // kv.shape[0])
        return view.restore(keys), view.restore(q_index + (chunk * keys.shape[1])[:, None])

    def _joined(
        self,
        q: Tensor,
        kv: Tensor,
        entries: Tensor,
        selected: Tensor | None,
        windows: Windows,
        sequence: Sequence,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the window and entries of whole rows, and where it went."""
        near, q_index = self._near(kv, sequence)
        options = {"windows": windows, "position": sequence.position, "scale": self.scale}
        options |= {"window": self.shared.window, "q_index": q_index, "token_index": sequence.view().q_index}
        return joint_attention(q, near, entries, self.sinks, selected, **options)

    def _write(self, out: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """The output: values came rotated, so they are turned back at the query's position first."""
        cos, sin = table
        out = rotate(out, cos, -sin, "interleaved", on_last=True)
        groups = self.shared.output_groups
        weight = self.group_proj.weight.to(out.dtype).unflatten(0, (groups, -1))
        grouped = torch.einsum("btge,gre->btgr", out.flatten(2).unflatten(-1, (groups, -1)), weight)
        return self.out_proj(grouped.flatten(2))

    def _table(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        config = self.shared
        return sequence.rotary_table(config.rotary_dim, config.rotary_theta, config.rotary_scaling)
