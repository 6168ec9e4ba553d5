"""Attention with one key, which is its value too, over a window and heavily compressed entries (DeepSeek-V4).

Without compression it is the plain windowed form of the same system.
"""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kernels.attention import attention
from model.mixer import Mixed, Sequence, TPShard
from model.shared_key import Compressor, SharedKeyConfig, SharedKeyMixer, compressor_tp_plan


class HcaConfig(SharedKeyConfig):
    """Fields of heavily compressed attention."""

    kind: Literal["hca"] = "hca"
    compression: int | None = Field(ge=1)

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Hca":
        """The module; all layers are alike."""
        return Hca(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _extra_params(self, width: int) -> tuple[int, int]:
        if self.compression is None:
            return 0, 0
        return 2 * width * self.head_dim, (self.compression + 1) * self.head_dim

    def _extra_core(self, context: int) -> float:
        if self.compression is None:
            return 0.0
        seen = 4 * self.num_heads * self.head_dim * context / (2 * self.compression)
        return seen + 6 * self.head_dim

    def _extra_bytes(self, element_bytes: int) -> int:
        if self.compression is None:
            return 0
        entries = self._entry_bytes(self.head_dim, element_bytes) // self.compression
        return 2 * self.head_dim * element_bytes + entries + 12

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Keys of the window, entries, and the compressor's inputs of the window that is not complete."""
        size = self.head_dim * element_bytes
        window = min(self.window - 1, context)
        if self.compression is None:
            return size * window
        pending = 2 * min(self.compression - 1, context)
        return size * (window + context // self.compression + pending)

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """As without compression; the compressor is every rank's."""
        tp_plan = dict(super().tp_plan(width))
        return tp_plan if self.compression is None else tp_plan | compressor_tp_plan("compressor")


class Hca(SharedKeyMixer):
    """A window of raw keys, and all entries of complete windows, under one softmax with a sink."""

    def __init__(self, config: HcaConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__(config, width, init_std, out_std)
        self.config = config
        if config.compression is not None:
            self.compressor = Compressor(
                config, width, config.head_dim, config.compression, init_std, is_overlapping=False
            )

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"] | Mixed:
        """Windows count from each document's start; what they leave over is in reach of the raw keys."""
        config, table = self.config, self._table(sequence)
        _, q, kv = self._read(x, table)
        if config.compression is None:
            view, sinks = sequence.view(config.window - 1), self.sinks.to(q.dtype)
            key = view.keys(kv)[:, :, None]
            options = {"window": config.window, "document": view.document, "q_index": view.q_index}
            out = attention(view.queries(q), key, key, scale=self.scale, sinks=sinks, **options)
            return self._write(view.restore(out), table)
        made = sequence.compression(config.compression, config.compression)
        out, _ = self._joined(q, kv, self.compressor(x, made), None, made.whole, sequence)
        return self._write(out, table)
