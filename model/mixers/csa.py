"""Attention with one shared key over a window and chosen, lightly compressed entries (DeepSeek-V4)."""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.indexer import index_loss_of_chosen, index_select
from kernels.rotary import rotate
from model.linear import Linear
from model.mixer import Mixed, Sequence, TPShard
from model.sequence_sharding import Compression
from model.shared_key import Compressor, SharedKeyConfig, SharedKeyMixer, compressor_tp_plan


class CsaConfig(SharedKeyConfig):
    """Fields of compressed sparse attention."""

    kind: Literal["csa"] = "csa"
    compression: int = Field(ge=1)
    index_heads: int = Field(ge=1)
    index_dim: int = Field(ge=2)
    index_top_k: int = Field(ge=1)
    index_loss: float = Field(ge=0)

    @model_validator(mode="after")
    def _index_fits(self) -> "CsaConfig":
        if self.rotary_dim > self.index_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} must be at most index_dim {self.index_dim}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Csa":
        """The module; all layers are alike."""
        return Csa(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _extra_params(self, width: int) -> tuple[int, int]:
        both = self.head_dim + self.index_dim
        queries = self.index_heads * (self.query_rank * self.index_dim + width)
        return 4 * width * both + queries, (2 * self.compression + 1) * both

    def _extra_core(self, context: int) -> float:
        entries = context / (2 * self.compression)
        index = 2 * self.index_heads * (self.index_dim + 1) * entries
        chosen = min(self.index_top_k, entries)
        return index + 4 * self.num_heads * self.head_dim * chosen + 12 * (self.head_dim + self.index_dim)

    def _extra_bytes(self, element_bytes: int) -> int:
        learning = (self.head_dim, self.index_dim) if self.index_loss else (self.head_dim,)
        entries = sum(self._entry_bytes(dim, element_bytes) for dim in learning) // self.compression
        index = self.index_heads * (self.index_dim + 1) if self.index_loss else 0
        choice = 4 * (self.window + self.index_top_k)
        return element_bytes * (4 * sum(learning) + index) + entries + choice

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Keys of the window, entries and index keys, and the compressors' inputs that are still open.

        An entry takes half of the keys and gates of the window before its own, and all of its own.
        """
        both, window = self.head_dim + self.index_dim, self.head_dim * min(self.window - 1, context)
        pending = 2 * both * (2 * min(self.compression - 1, context) + min(self.compression, context))
        return element_bytes * (window + both * (context // self.compression) + pending)

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """As without compression; compressor and indexer are every rank's."""
        indexer = {f"indexer.{name}.weight": TPShard(None) for name in ("q_proj", "head_proj")}
        compressors = compressor_tp_plan("compressor") | compressor_tp_plan("indexer.compressor")
        return {**super().tp_plan(width), **compressors, **indexer}

    @property
    def losses(self) -> tuple[str, ...]:
        """What the indexer learns from, if it does."""
        return ("index",) if self.index_loss else ()


class Indexer(nn.Module):
    """Scores entries by a compressor of its own and many small heads."""

    def __init__(self, config: CsaConfig, width: int, init_std: float) -> None:
        super().__init__()
        self.config = config
        self.q_proj = Linear(config.query_rank, config.index_heads * config.index_dim, init_std)
        self.head_proj = Linear(width, config.index_heads, init_std)
        self.compressor = Compressor(
            config, width, config.index_dim, config.compression, init_std, is_overlapping=True
        )

    def forward(
        self, x: Tensor, latent: Tensor, sequence: Sequence, made: Compression
    ) -> tuple[Float[Tensor, "B T J I"], Float[Tensor, "B N I"], Float[Tensor, "B T J"]]:
        """Queries, keys of the entries, and the weights of the heads, scales included."""
        config = self.config
        q = self.q_proj(latent).unflatten(-1, (-1, config.index_dim))
        table = sequence.rotary_table(config.rotary_dim, config.rotary_theta, config.rotary_scaling)
        q = rotate(q, *table, "interleaved", on_last=True)
        weight = self.head_proj(x) * (config.index_heads * config.index_dim) ** -0.5
        return q, self.compressor(x, made), weight


class Csa(SharedKeyMixer):
    """A window of raw keys, and the entries that an indexer chose, under one softmax with a sink."""

    def __init__(self, config: CsaConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__(config, width, init_std, out_std)
        self.config = config
        self.compressor = Compressor(
            config, width, config.head_dim, config.compression, init_std, is_overlapping=True
        )
        self.indexer = Indexer(config, width, init_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Mixed:
        """The indexer chooses without a gradient and learns from `index`, which reaches nothing else."""
        config, view, table = self.config, sequence.view(), self._table(sequence)
        latent, q, kv = self._read(x, table)
        # An entry reads the window before its own as well.
        made = sequence.compression(config.compression, config.compression, before=config.compression)
        index_q, index_k, weight = self.indexer(x.detach(), latent.detach(), sequence, made)
        selected = index_select(
            index_q,
            index_k,
            weight,
            top_k=config.index_top_k,
            last=made.whole.last,
            document=view.document,
            q_index=view.q_index,
        )
        out, mass = self._joined(q, kv, self.compressor(x, made), selected, made.whole, sequence)
        out = self._write(out, table)
        if not config.index_loss:
            return Mixed(out)
        # Ranks with other heads compute the same loss: each counts its share.
        loss = index_loss_of_chosen(index_q, index_k, weight, selected, self.head_shards.sum(mass))
        return Mixed(out, {"index": config.index_loss / self.head_shards.size * loss})
