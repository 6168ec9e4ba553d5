"""Block-sparse attention: an indexer chooses blocks by their best index key (MiniMax-M3)."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.block_attention import block_attention
from kernels.block_selection import select_by_max
from kernels.rotary import rotate
from kernels.selection_loss import selection_loss
from model.grouped_query import GroupedQueryConfig, keys_seen
from model.linear import Linear, RMSNorm
from model.mixer import Flops, Mixed, Mixer, Sequence, TPShard


class MsaConfig(GroupedQueryConfig):
    """Fields of block-sparse attention with an indexer."""

    kind: Literal["msa"] = "msa"
    rotary_of = ("head_dim", "index_dim")
    head_dim: int = Field(ge=2)
    index_dim: int = Field(ge=2)
    block: int = Field(ge=1)
    num_blocks: int = Field(ge=1)
    num_local_blocks: int = Field(ge=1)
    index_loss: float = Field(ge=0)
    norm_eps: float = Field(gt=0, lt=1)
    has_zero_centered_norm: bool

    @model_validator(mode="after")
    def _fits(self) -> "MsaConfig":
        if self.num_local_blocks > self.num_blocks:
            raise ValueError(f"num_local_blocks {self.num_local_blocks} exceeds num_blocks {self.num_blocks}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Msa":
        """The module; all layers are alike."""
        return Msa(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _parts(self) -> tuple[int, int, int]:
        keys = self.num_key_heads * self.head_dim
        return self.num_heads * self.head_dim, keys, keys

    def _projected(self) -> int:
        return sum(self._parts()) + self._parts()[0] + (self.num_key_heads + 1) * self.index_dim

    def count_params(self, width: int) -> int:
        """Projections of attention and indexer, and their norms per head."""
        return width * self._projected() + 2 * (self.head_dim + self.index_dim)

    def flops(self, width: int, context: int) -> Flops:
        """Index scores of all pairs, then attention over the chosen blocks."""
        index = 2 * self.num_key_heads * self.index_dim * (context + 1) / 2
        core = 4 * self._parts()[0] * keys_seen(context, self.block, self.num_blocks)
        return Flops(2 * width * self._projected(), index + core)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Keys, values and index keys of all tokens."""
        return (2 * self._parts()[1] + self.index_dim) * context * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, normed copies, output, statistics, chosen blocks, their best index keys and scores."""
        queries, keys, _ = self._parts()
        index = (self.num_key_heads + 1) * self.index_dim
        kept = sum(self._parts()) + 2 * queries + keys + 2 * index
        rows = 2 * self.num_heads + 2 * self.num_key_heads + 1
        # By index into the row: the choice, the lists of the blocks, and the best keys.
        lists = 8 * (2 * self.num_blocks - 1 - self.num_local_blocks + self.num_blocks)
        best = self.num_blocks * (element_bytes * self.index_dim + 10)
        return element_bytes * kept + 4 * (rows + 1) + self.num_key_heads * (lists + best)

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; a key head and its index head are shared by a group of query heads."""
        norms = ("q_norm", "k_norm", "indexer.q_norm", "indexer.k_norm")
        return {
            "in_proj.weight": TPShard(0, self._parts()),
            "indexer.q_proj.weight": TPShard(0),
            "indexer.k_proj.weight": TPShard(None),
            "out_proj.weight": TPShard(1),
        } | {f"{name}.weight": TPShard(None) for name in norms}

    @property
    def losses(self) -> tuple[str, ...]:
        """What the indexer learns from, if it does."""
        return ("index",) if self.index_loss else ()

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Keys, values and index keys are gathered; block scores follow from them."""
        return "gather"


class Indexer(nn.Module):
    """Index queries for each key head and one index key, normed and rotated."""

    def __init__(self, config: MsaConfig, width: int, init_std: float) -> None:
        super().__init__()
        self.config = config
        self.q_proj = Linear(width, config.num_key_heads * config.index_dim, init_std)
        self.k_proj = Linear(width, config.index_dim, init_std)
        is_zero_centered = config.has_zero_centered_norm
        self.q_norm = RMSNorm(config.index_dim, config.norm_eps, is_zero_centered=is_zero_centered)
        self.k_norm = RMSNorm(config.index_dim, config.norm_eps, is_zero_centered=is_zero_centered)

    def forward(
        self, x: Float[Tensor, "B T D"], sequence: Sequence
    ) -> tuple[Float[Tensor, "B T J K"], Float[Tensor, "B T 1 K"]]:
        """Queries and key of every token."""
        config = self.config
        q, k = (part.unflatten(-1, (-1, config.index_dim)) for part in (self.q_proj(x), self.k_proj(x)))
        q, k = self.q_norm(q), self.k_norm(k)
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta)
            q, k = rotate(q, *table), rotate(k, *table)
        return q, k


class Msa(Mixer):
    """Attention over the own block and the best earlier ones; the query heads of a key head share them."""

    def __init__(self, config: MsaConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.out_proj = Linear(self.parts[0], width, out_std)
        is_zero_centered = config.has_zero_centered_norm
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, is_zero_centered=is_zero_centered)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, is_zero_centered=is_zero_centered)
        self.indexer = Indexer(config, width, init_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Mixed:
        """The indexer chooses without a gradient and learns from `index`, which reaches nothing else."""
        config, view = self.config, sequence.view()
        q, k, v = self.in_proj(x).split(self.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)) for part in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta)
            q, k = rotate(q, *table), rotate(k, *table)
        index_q, index_k = self.indexer(x.detach(), sequence)
        k, v, index_k = (view.keys(part) for part in (k, v, index_k))
        count, local = config.num_blocks - 1, config.num_local_blocks - 1
        options = {"block": config.block, "position": view.position, "q_index": view.q_index}
        selected, best_keys = select_by_max(index_q, index_k, count=count, local=local, **options)
        out, mass = block_attention(q, k, v, selected, scale=config.head_dim**-0.5, **options)
        out = self.out_proj(out.flatten(-2))
        if not config.index_loss:
            return Mixed(out)
        # Scaled as in attention: unscaled, the first softmax would be nearly one-hot.
        scores = _scores_at(index_q, index_k, best_keys) * config.index_dim**-0.5
        is_seen = torch.nn.functional.pad(selected >= 0, (1, 0), value=True)
        # Sharers of a key head have the same index head and choice: each counts its share of one loss.
        loss = (
            selection_loss(scores, self.head_shards.sum_kv_replicas(mass.detach()), is_seen)
            / self.head_shards.kv_replicas
        )
        return Mixed(out, {"index": config.index_loss * loss})


def _scores_at(
    q: Float[Tensor, "B T J K"], k: Float[Tensor, "B S 1 K"], best_keys: Int[Tensor, "B T J m"]
) -> Float[Tensor, "B T J m"]:
    index = best_keys.flatten(1)[..., None].expand(-1, -1, k.shape[-1])
    best = k[:, :, 0].gather(1, index).view(*best_keys.shape, -1)
    return (q[:, :, :, None] * best).sum(-1)
