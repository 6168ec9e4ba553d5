"""Sparse attention trained along with full attention: one is passed on, the other kept close (SSA)."""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kernels.attention import attention
from kernels.block_attention import block_attention
from kernels.compress import mean_compress
from kernels.compressed_attention import Choice
from kernels.document_windows import document_windows
from kernels.rotary import rotate
from model.block_choice import select_across_shards
from model.grouped_query import GroupedQueryConfig, keys_seen
from model.linear import Linear
from model.mixer import Flops, Mixed, Mixer, Sequence, TPShard
from model.sequence_sharding import AttentionView


class SsaConfig(GroupedQueryConfig):
    """Fields of sparse attention trained along with full attention."""

    kind: Literal["ssa"] = "ssa"
    head_dim: int = Field(ge=2)
    block: int = Field(ge=1)
    num_blocks: int = Field(ge=1)
    num_initial_blocks: int = Field(ge=0)
    num_local_blocks: int = Field(ge=1)
    stream: Literal["full", "sparse"]
    sparse_share: float = Field(ge=0, le=1)
    alignment_loss: float = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "SsaConfig":
        forced = self.num_initial_blocks + self.num_local_blocks
        if forced > self.num_blocks:
            raise ValueError(f"initial and local blocks, {forced}, exceed num_blocks {self.num_blocks}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Ssa":
        """The module; the alignment loss is a mean over the layers of the model."""
        return Ssa(self, width, depth, init_std, init_std / (2 * depth) ** 0.5)

    def _parts(self) -> tuple[int, int, int, int]:
        keys = self.num_key_heads * self.head_dim
        return self.num_heads * self.head_dim, keys, keys, self.num_heads

    def count_params(self, width: int) -> int:
        """Projections and gate."""
        return width * (sum(self._parts()) + self._parts()[0])

    def flops(self, width: int, context: int) -> Flops:
        """Both streams, as in training: all keys, then block scores and the chosen blocks."""
        size = self._parts()[0]
        full, chosen = (context + 1) / 2, keys_seen(context, self.block, self.num_blocks)
        core = 4 * size * (full + chosen) + 2 * size * context / (2 * self.block)
        return Flops(2 * width * (sum(self._parts()) + size), core)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Keys and values of all tokens, and the mean key of each block."""
        keys = self._parts()[1]
        return (2 * keys * context + keys * (context // self.block)) * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, rotated queries and keys, both outputs before and after the gate, chosen blocks."""
        queries, keys, _, gates = self._parts()
        kept = sum(self._parts()) + (queries + keys) * (self.rotary_dim > 0) + gates + 4 * queries
        chosen = 16 * self.num_key_heads * (self.num_blocks - 1)
        # They are compared in float32.
        wide = 4 * queries if element_bytes < 4 else 0
        return element_bytes * kept + wide + 8 * self.num_heads + chosen + 4

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; a key head is shared by its group of query heads."""
        return {"in_proj.weight": TPShard(0, self._parts()), "out_proj.weight": TPShard(1)}

    @property
    def losses(self) -> tuple[str, ...]:
        """How far both streams are apart."""
        return ("alignment",)

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Keys and values are gathered; both streams share them."""
        return "gather"


class Ssa(Mixer):
    """One set of queries, keys, values and gates, read by full attention and by block attention."""

    def __init__(self, config: SsaConfig, width: int, depth: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts, self.depth = config, config._parts(), depth
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.out_proj = Linear(self.parts[0], width, out_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"] | Mixed:
        """The stream that `sequence.uniform` picks, and the alignment of both; without it, the config's."""
        config = self.config
        q, k, v, gate = self.in_proj(x).split(self.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in (q, k, v))
        gate = gate.sigmoid()[..., None]
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta)
            q, k = rotate(q, *table), rotate(k, *table)
        view = sequence.view()
        k, v = view.keys(k), view.keys(v)
        if sequence.uniform is None:
            stream = self._full if config.stream == "full" else self._sparse
            return self.out_proj((gate * stream(q, k, v, view)).flatten(-2))
        full, sparse = (gate * stream(q, k, v, view) for stream in (self._full, self._sparse))
        drawn = sparse if sequence.uniform < config.sparse_share else full
        losses = {
            "alignment": config.alignment_loss / (self.depth * self.head_shards.size) * _apart(full, sparse)
        }
        return Mixed(self.out_proj(drawn.flatten(-2)), losses)

    def _full(self, q: Tensor, k: Tensor, v: Tensor, view: AttentionView) -> Tensor:
        scale, document, q_index = self.config.head_dim**-0.5, view.document, view.q_index
        return attention(q, k, v, scale=scale, document=document, q_index=q_index)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, view: AttentionView) -> Tensor:
        config = self.config
        options = {"position": view.position, "q_index": view.q_index, "scale": config.head_dim**-0.5}
        blocks = document_windows(view.position, config.block, config.block)
        selected = select_across_shards(
            q,
            mean_compress(k, blocks),
            view,
            self.head_shards,
            entries=blocks,
            blocks=blocks,
            scale=options["scale"],
            choice=Choice(
                count=config.num_blocks - 1,
                initial=config.num_initial_blocks,
                local=config.num_local_blocks - 1,
            ),
        )
        return block_attention(q, k, v, selected, block=config.block, **options)[0]


def _apart(full: Float[Tensor, "B T H V"], sparse: Float[Tensor, "B T H V"]) -> Float[Tensor, ""]:
    """Smooth L1 of each stream to the other at rest: mean over heads and dims, sum over tokens."""
    full = full.float() if full.dtype.itemsize < 4 else full
    both = smooth_l1_loss(full, sparse.detach(), reduction="sum")
    both = both + smooth_l1_loss(sparse, full.detach(), reduction="sum")
    return both / (full.shape[2] * full.shape[3])
