"""Mixture of block attention: each query head attends to its own block and the best earlier ones (MoBA)."""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kernels.block_attention import block_attention
from kernels.block_selection import select_by_mean
from kernels.rotary import rotate
from model.grouped_query import GroupedQueryConfig, keys_seen
from model.linear import Linear
from model.mixer import Flops, Mixer, Sequence, TPShard


class MobaConfig(GroupedQueryConfig):
    """Fields of mixture of block attention."""

    kind: Literal["moba"] = "moba"
    head_dim: int = Field(ge=2)
    block: int = Field(ge=1)
    num_blocks: int = Field(ge=1)

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Moba":
        """The module; all layers are alike."""
        return Moba(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _parts(self) -> tuple[int, int, int]:
        keys = self.num_key_heads * self.head_dim
        return self.num_heads * self.head_dim, keys, keys

    def count_params(self, width: int) -> int:
        """Projections; the gate has no parameters."""
        return width * (sum(self._parts()) + self._parts()[0])

    def flops(self, width: int, context: int) -> Flops:
        """Gate scores over block means, then attention over the chosen blocks."""
        size = self.num_heads * self.head_dim
        core = 2 * size * context / (2 * self.block) + 4 * size * keys_seen(
            context, self.block, self.num_blocks
        )
        return Flops(2 * width * (sum(self._parts()) + self._parts()[0]), core)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Keys and values of all tokens, and the mean key of each block."""
        keys = self._parts()[1]
        return (2 * keys * context + keys * (context // self.block)) * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, rotated queries and keys, output, log-sum-exp, chosen blocks and who chose them."""
        queries, keys, _ = self._parts()
        kept = sum(self._parts()) + (queries + keys) * (self.rotary_dim > 0) + queries
        # The block of the query itself is always seen, and not chosen.
        return element_bytes * kept + self.num_heads * (4 + 16 * (self.num_blocks - 1)) + 4

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; a key head is shared by its group of query heads."""
        return {"in_proj.weight": TPShard(0, self._parts()), "out_proj.weight": TPShard(1)}

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Keys and values are gathered; block means follow from them."""
        return "gather"


class Moba(Mixer):
    """Block attention whose gate is the product of a query with the mean of a block's keys."""

    def __init__(self, config: MobaConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.out_proj = Linear(self.parts[0], width, out_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """Blocks count from each document's start; the own block is always among the chosen."""
        config = self.config
        q, k, v = self.in_proj(x).split(self.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in (q, k, v))
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta)
            q, k = rotate(q, *table), rotate(k, *table)
        view = sequence.view()
        k, v = view.keys(k), view.keys(v)
        options = {"block": config.block, "position": view.position, "q_index": view.q_index}
        selected = select_by_mean(q, k, count=config.num_blocks - 1, **options)
        out, _ = block_attention(q, k, v, selected, scale=config.head_dim**-0.5, **options)
        return self.out_proj(out.flatten(-2))
