"""Native sparse attention: compressed, selected and windowed keys, each under a gate per head."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.attention import attention
from kernels.block_attention import block_attention
from kernels.compress import mean_compress, mlp_compress
from kernels.compressed_attention import Choice, entry_attention
from kernels.document_windows import Windows, document_windows
from kernels.rotary import rotate
from model.block_choice import select_across_shards
from model.grouped_query import GroupedQueryConfig, keys_seen
from model.linear import Initial, Linear
from model.mixer import Flops, Mixer, Sequence, TPShard
from model.sequence_sharding import Compression


class NsaConfig(GroupedQueryConfig):
    """Fields of native sparse attention."""

    kind: Literal["nsa"] = "nsa"
    rotary_of = ("key_dim",)
    key_dim: int = Field(ge=2)
    value_dim: int = Field(ge=1)
    has_shared_keys: bool
    compressor: Literal["mlp", "mean"]
    compressor_hidden: int = Field(ge=1)
    entry_length: int = Field(ge=1)
    entry_stride: int = Field(ge=1)
    block: int = Field(ge=1)
    num_blocks: int = Field(ge=1)
    num_initial_blocks: int = Field(ge=0)
    num_local_blocks: int = Field(ge=1)
    window: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "NsaConfig":
        stride = self.entry_stride
        if self.entry_length % stride or self.block % stride:
            lengths = (self.entry_length, self.block)
            raise ValueError(f"entry_length and block {lengths} must be multiples of entry_stride {stride}")
        forced = self.num_initial_blocks + self.num_local_blocks
        if forced > self.num_blocks:
            raise ValueError(f"initial and local blocks, {forced}, exceed num_blocks {self.num_blocks}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Nsa":
        """The module; all layers are alike."""
        return Nsa(self, width, init_std, init_std / (2 * depth) ** 0.5)

    @property
    def num_branches(self) -> int:
        """How many keys and values a token has: one for each branch, or one for all."""
        return 1 if self.has_shared_keys else 3

    def _parts(self) -> tuple[int, ...]:
        keys, values = self.num_key_heads * self.key_dim, self.num_key_heads * self.value_dim
        branches = self.num_branches
        return (
            self.num_heads * self.key_dim,
            *[keys] * branches,
            *[values] * branches,
            *[self.num_heads] * 3,
        )

    def _compressor_params(self) -> int:
        if self.compressor == "mean":
            return 0
        size, hidden = self.key_dim + self.value_dim, self.compressor_hidden
        return self.num_key_heads * size * (self.entry_length + hidden * (self.entry_length + 1))

    def count_params(self, width: int) -> int:
        """Projections and compressors."""
        out = self.num_heads * self.value_dim
        return width * (sum(self._parts()) + out) + self._compressor_params()

    def flops(self, width: int, context: int) -> Flops:
        """Compressors once per stride; scores and weighted values of the three branches."""
        out = self.num_heads * self.value_dim
        window = min(self.window, context)
        seen = window - window * (window - 1) / (2 * context)
        seen += context / (2 * self.entry_stride) + keys_seen(context, self.block, self.num_blocks)
        core = 2 * self.num_heads * (self.key_dim + self.value_dim) * seen
        compressing = 2 * self._compressor_params() / self.entry_stride
        return Flops(2 * width * (sum(self._parts()) + out), core + compressing)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Keys and values of all tokens, whole entries, and those of the window and of open entries."""
        size = self.num_key_heads * (self.key_dim + self.value_dim) * element_bytes
        entries = max(0, (context - self.entry_length) // self.entry_stride + 1)
        window = 0 if self.has_shared_keys else min(self.window - 1, context)
        pending = 0 if self.has_shared_keys else min(self.entry_length - 1, context)
        return size * (context + entries + window + pending)

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, rotated queries and keys, the branches' outputs and gates, their sum, what compression
        keeps and the chosen blocks.
        """
        # Keys are compressed as windows of their own.
        rotated = self._parts()[0] + max(1, self.num_branches - 1) * self._parts()[1]
        rotated *= self.rotary_dim > 0
        kept = sum(self._parts()) + rotated + 4 * self.num_heads * self.value_dim + 3 * self.num_heads
        dims = self.key_dim + self.value_dim
        entry = self.entry_length * dims + 4 * self.compressor_hidden + dims
        entry = dims if self.compressor == "mean" else entry
        kept += self.num_key_heads * entry // self.entry_stride
        chosen = 16 * self.num_key_heads * (self.num_blocks - 1)
        return element_bytes * kept + 12 * (self.num_heads + 1) + chosen

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; a key head and its compressor are shared by a group of query heads."""
        tp_plan = {
            "in_proj.weight": TPShard(0, self._parts()),
            "out_proj.weight": TPShard(1),
        }
        if self.compressor == "mean":
            return tp_plan
        names = ("position_encoding", "first", "second")
        return tp_plan | {f"{part}.{name}": TPShard(0) for part in ("phi_k", "phi_v") for name in names}

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Keys, values and entries are gathered; entries and the window read the left neighbour's tail."""
        return "gather"


class Perceptron(nn.Module):
    """Compresses the tokens of a window to one entry, with weights of its own for each head."""

    def __init__(self, heads: int, dim: int, hidden: int, length: int, init_std: float) -> None:
        super().__init__()
        self.position_encoding = nn.Parameter(torch.empty(heads, length, dim))
        self.first = nn.Parameter(torch.empty(heads, hidden, length * dim))
        self.second = nn.Parameter(torch.empty(heads, dim, hidden))
        self.initial = {
            "position_encoding": Initial("normal", 0.0, init_std),
            "first": Initial("normal", 0.0, (length * dim) ** -0.5, is_decayed=True),
            "second": Initial("normal", 0.0, hidden**-0.5, is_decayed=True),
        }

    def forward(self, x: Float[Tensor, "B T G K"], windows: Windows) -> Float[Tensor, "B N G K"]:
        """An entry for each window."""
        position_encoding, first, second = (
            weight.to(x.dtype) for weight in (self.position_encoding, self.first, self.second)
        )
        return mlp_compress(x, position_encoding, first, second, windows)


class Nsa(Mixer):
    """Three branches over the same queries; the compressed one chooses blocks for the selected one."""

    fusible = ("_close",)

    def __init__(self, config: NsaConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.out_proj = Linear(config.num_heads * config.value_dim, width, out_std)
        self.phi_k = self.phi_v = None
        if config.compressor == "mlp":
            sizes = (config.compressor_hidden, config.entry_length, init_std)
            self.phi_k = Perceptron(config.num_key_heads, config.key_dim, *sizes)
            self.phi_v = Perceptron(config.num_key_heads, config.value_dim, *sizes)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """Entries and blocks count from each document's start; keys are compressed after rotary."""
        config, branches = self.config, self.config.num_branches
        q, *rest = self.in_proj(x).split(self.parts, dim=-1)
        q = q.unflatten(-1, (-1, config.key_dim))
        keys = [part.unflatten(-1, (-1, config.key_dim)) for part in rest[:branches]]
        values = [part.unflatten(-1, (-1, config.value_dim)) for part in rest[branches : 2 * branches]]
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta)
            q, keys = rotate(q, *table), [rotate(k, *table) for k in keys]
        outs = self._branches(q, keys * (4 - len(keys)), values * (4 - len(values)), sequence)
        return self._close(rest[2 * branches :], outs)

    def _close(self, gates: list[Tensor], outs: tuple[Tensor, ...]) -> Tensor:
        """The gated sum of the branches, projected."""
        parts = [gate.sigmoid()[..., None] * out for gate, out in zip(gates, outs, strict=True)]
        return self.out_proj((parts[0] + parts[1] + parts[2]).flatten(-2))

    def _branches(
        self, q: Tensor, keys: list[Tensor], values: list[Tensor], sequence: Sequence
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, scale, view = self.config, self.config.key_dim**-0.5, sequence.view()
        options = {"position": view.position, "q_index": view.q_index, "scale": scale}
        made = sequence.compression(config.entry_length, config.entry_stride)
        blocks = document_windows(view.position, config.block, config.block)
        windows: dict[str, Any] = {"entries": made.whole, "blocks": blocks}
        choice = Choice(
            count=config.num_blocks - 1,
            initial=config.num_initial_blocks,
            local=config.num_local_blocks - 1,
        )
        entry_k = _entries(keys[0], made, self.phi_k)
        entry_v = _entries(values[0], made, self.phi_v)
        # Heads that are not all here choose together, in a step of its own.
        is_shared = self.head_shards.kv_replicas > 1
        alone = Choice(count=0, initial=0, local=0) if is_shared else choice
        compressed, selected = entry_attention(q, entry_k, entry_v, **windows, **alone, **options)
        if is_shared:
            selected = select_across_shards(
                q, entry_k, view, self.head_shards, **windows, scale=scale, choice=choice
            )
        k, v = view.keys(keys[1]), view.keys(values[1])
        chosen, _ = block_attention(q, k, v, selected, block=config.block, **options)
        view = sequence.view(config.window - 1)
        options = {"window": config.window, "document": view.document, "q_index": view.q_index}
        q, k, v = view.queries(q), view.keys(keys[2]), view.keys(values[2])
        return compressed, chosen, view.restore(attention(q, k, v, scale=scale, **options))


def _entries(x: Tensor, made: Compression, phi: Perceptron | None) -> Float[Tensor, "B N G K"]:
    """One entry for each window of whole rows; without a perceptron the mean of its tokens."""
    x = made.tokens(x)
    return made.entries(mean_compress(x, made.local) if phi is None else phi(x, made.local))
