"""DeepSeek sparse attention: an indexer chooses the keys that a latent attention reads (DeepSeek-V3.2)."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.attention import attention_with_lse
from kernels.indexer import index_loss, index_loss_of_chosen, index_select, pool_keys, pool_selection
from kernels.rotary import RotaryLayout, rotate
from kernels.selected_attention import selected_attention, selected_attention_with_shares
from model.latent_attention import LatentConfig, LatentMixer, Latents
from model.linear import Initial, LayerNorm, Linear
from model.mixer import Flops, Mixed, Sequence, TPShard
from model.sequence_sharding import AttentionView


class DsaConfig(LatentConfig):
    """Fields of DeepSeek sparse attention."""

    kind: Literal["dsa"] = "dsa"
    top_k: int = Field(ge=1)
    index: Literal["own", "shared"]
    index_heads: int = Field(ge=1)
    index_dim: int = Field(ge=1)
    index_rotary_layout: RotaryLayout
    index_eps: float = Field(gt=0, lt=1)
    index_pool: int = Field(ge=1)
    index_stage: Literal["dense", "selected"]
    index_loss: float = Field(gt=0)

    @model_validator(mode="after")
    def _index_fits(self) -> "DsaConfig":
        if self.rotary_dim > self.index_dim:
            raise ValueError(f"index_dim {self.index_dim} must be at least rotary_dim {self.rotary_dim}")
        if self.top_k % self.index_pool:
            raise ValueError(f"top_k {self.top_k} must be a multiple of index_pool {self.index_pool}")
        if self.index_pool > 1 and self.rotary_dim:
            raise ValueError(f"index_pool {self.index_pool} pools rotated keys; set rotary_dim to 0")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Dsa":
        """The module; all layers are alike."""
        return Dsa(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _index_parts(self) -> tuple[int, int, int]:
        # What the indexer makes of the input: keys, head weights, gates of the pools.
        return self.index_dim, self.index_heads, self.index_dim * (self.index_pool > 1)

    def _index_weights(self, width: int) -> int:
        if self.index == "shared":
            return 0
        inputs = self.query_latent_dim or width
        return width * sum(self._index_parts()) + inputs * self.index_heads * self.index_dim

    def count_params(self, width: int) -> int:
        """Those of the attention and of the indexer."""
        if self.index == "shared":
            return super().count_params(width)
        small = 2 * self.index_dim + self.index_pool * self.index_dim * (self.index_pool > 1)
        return super().count_params(width) + self._index_weights(width) + small

    def flops(self, width: int, context: int) -> Flops:
        """Index scores of all keys, and attention over the chosen ones in the space of the latent."""
        dense = super().flops(width, context)
        projections = dense.projections + 2 * self._index_weights(width)
        scores = (2 * self.index_dim + 3) * self.index_heads * (context + 1) / (2 * self.index_pool)
        scores = scores if self.index == "own" else 0.0
        if self.index_stage == "dense":
            return Flops(projections, dense.core + scores)
        reach = min(self.top_k, context)
        keys = reach - reach * (reach - 1) / (2 * context)
        core = 2 * self.num_heads * (2 * self.latent_dim + self.shared_key_dim) * keys
        return Flops(projections, core + scores)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Latents, shared keys and index keys; pooled ones with the keys and gates of the open pool."""
        latents = super().cache_bytes(context, element_bytes=element_bytes)
        if self.index == "shared":
            return latents
        kept = context // self.index_pool + 2 * (self.index_pool - 1)
        return latents + self.index_dim * kept * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """What reading keeps, queries, keys and output in the space of the latent, output, indexer."""
        index = self._index_bytes(element_bytes) if self.index == "own" else 0
        if self.index_stage == "dense":
            return super().activation_bytes(width, element_bytes=element_bytes) + index
        shared = self.latent_dim + self.shared_key_dim
        kept = (self.num_heads + 1) * shared + self.num_heads * (self.latent_dim + self.value_dim)
        choice = 0 if self.index == "shared" else 8 * (self.top_k + self.index_pool - 1)
        return self._read_bytes(element_bytes) + element_bytes * kept + 4 * self.num_heads + choice + index

    def _index_bytes(self, element_bytes: int) -> int:
        """Queries, weights and keys of the indexer; the keys' norm and pooling are in float32."""
        kept = self.index_heads * (self.index_dim + 1) + self.index_dim // self.index_pool
        normed = 4 * self.index_dim + 8
        if self.index_pool == 1:
            return element_bytes * kept + normed
        kept += sum(self._index_parts()) + self.index_dim
        return element_bytes * kept + normed + 8 * self.index_dim + 8

    @property
    def losses(self) -> tuple[str, ...]:
        """What the indexer learns from, where it has one of its own."""
        return () if self.index == "shared" else ("index",)

    @property
    def selection(self) -> Literal["makes", "reads"] | None:
        """The indexer's, once it no longer warms up."""
        if self.index_stage == "dense":
            return None
        return "reads" if self.index == "shared" else "makes"

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads of the attention are the unit; every rank keeps the indexer whole."""
        tp_plan = dict(super().tp_plan(width))
        if self.index == "own":
            names = ["index_q_proj.weight", "index_proj.weight", "index_norm.weight", "index_norm.bias"]
            names += ["index_places"] * (self.index_pool > 1)
            tp_plan |= {name: TPShard(None) for name in names}
        return tp_plan


class Index(NamedTuple):
    """Queries, keys and head weights of the indexer, and the last token of each key's pool if it pools."""

    q: Float[Tensor, "B T N D"]
    k: Float[Tensor, "B P D"]
    weights: Float[Tensor, "B T N"]
    last: Int[Tensor, "B P"] | None


class Dsa(LatentMixer):
    """Latent attention over chosen keys.

    The indexer learns from its own loss alone: how far the softmax of its scores is from what the attention
    takes, over all keys while it is warmed up (stage dense), over the chosen ones after (stage selected).
    Nothing of that reaches the rest of the model.
    """

    def __init__(self, config: DsaConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__(config, width, init_std, out_std)
        self.config = config
        self.shares_selection = config.index == "shared"
        if self.shares_selection:
            return
        queries = config.index_heads * config.index_dim
        self.index_q_proj = Linear(config.query_latent_dim or width, queries, init_std)
        self.index_proj = Linear(width, sum(config._index_parts()), init_std)
        self.index_norm = LayerNorm(config.index_dim, config.index_eps, has_bias=True)
        if config.index_pool > 1:
            self.index_places = nn.Parameter(torch.empty(config.index_pool, config.index_dim))
            self.initial = {"index_places": Initial("constant", 0.0, is_float32=True)}

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        sequence: Sequence,
        selection: Int[Tensor, "B T k"] | None = None,
    ) -> Float[Tensor, "B T D"] | Mixed:
        """Queries see the keys that this layer, or the one that it shares with, chose in their document."""
        latents, view = self.latents(x, sequence), sequence.view()
        if self.config.index_stage == "dense":
            return self._dense(x, latents, sequence)
        if self.shares_selection:
            assert selection is not None, "the layout has a layer that chooses before this one"
            q, keys = self._in_latent(latents, view)
            return self._out(selected_attention(q, keys, self._values, selection, scale=self.config.scale))
        index = self._index(x, latents, sequence)
        entries = index_select(
            index.q,
            index.k,
            index.weights,
            top_k=self.config.top_k // self.config.index_pool,
            last=index.last,
            document=view.document,
            q_index=view.q_index,
        )
        selection = entries
        if index.last is not None:
            size = self.config.index_pool
            selection = pool_selection(entries, index.last, sequence.position, size, view.q_index)
        q, keys = self._in_latent(latents, view)
        inside, shares = selected_attention_with_shares(
            q, keys, self._values, selection, scale=self.config.scale
        )
        if index.last is not None:
            # The tokens of the open pool, at the end, are no entry.
            shares = shares[..., : entries.shape[2] * self.config.index_pool]
            shares = shares.unflatten(2, (-1, self.config.index_pool)).sum(3)
        # Ranks with other heads compute the same loss: each counts its share.
        loss = index_loss_of_chosen(index.q, index.k, index.weights, entries, self.head_shards.sum(shares))
        return Mixed(self._out(inside), {"index": self._index_loss * loss}, selection)

    def _dense(self, x: Tensor, latents: Latents, sequence: Sequence) -> Tensor | Mixed:
        view = sequence.view()
        keys, values = self.keys_values(latents, view)
        options = {"scale": self.config.scale, "document": view.document, "q_index": view.q_index}
        out, lse = attention_with_lse(latents.q, keys, values, **options)
        out = self.out_proj(out.flatten(-2))
        if self.shares_selection:
            return out
        index = self._index(x, latents, sequence)
        loss = index_loss(
            index.q,
            index.k,
            index.weights,
            self.head_shards.join(latents.q.detach(), 2),
            self.head_shards.join(keys.detach(), 2),
            self.head_shards.join(lse.detach(), 2),
            last=index.last,
            size=self.config.index_pool,
            **options,
        )
        return Mixed(out, {"index": self._index_loss * loss})

    @property
    def _index_loss(self) -> float:
        return self.config.index_loss / self.head_shards.size

    def _index(self, x: Tensor, latents: Latents, sequence: Sequence) -> Index:
        config = self.config
        q = self.index_q_proj(latents.q_latent.detach()).unflatten(-1, (config.index_heads, -1))
        k, weights, gates = self.index_proj(x.detach()).split(config._index_parts(), dim=-1)
        k = self.index_norm(k)
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta, config.rotary_scaling)
            q = rotate(q, *table, config.index_rotary_layout)
            k = rotate(k[:, :, None], *table, config.index_rotary_layout)[:, :, 0]
        weights = weights * (config.index_heads * config.index_dim) ** -0.5
        view = sequence.view()
        k = view.keys(k)
        if config.index_pool == 1:
            return Index(q, k, weights, None)
        k, last = pool_keys(k, view.keys(gates), self.index_places, view.position)
        return Index(q, k, weights, last)

    @property
    def _values(self) -> int:
        # The latent is what all heads read, and the first part of their keys.
        return self.config.latent_dim

    def _in_latent(self, latents: Latents, view: AttentionView) -> tuple[Tensor, Tensor]:
        """Queries and keys in the space of the latent: there all heads read the same keys, gathered once."""
        config = self.config
        own, shared = latents.q.split([config.key_dim, config.shared_key_dim], dim=-1)
        to_latent = self._up(own.dtype)[0]
        q = torch.cat([torch.einsum("bthk,hkl->bthl", own, to_latent), shared], dim=-1)
        return q, view.keys(torch.cat([latents.kv_latent[:, :, None], latents.shared_key], dim=-1))

    def _out(self, inside: Float[Tensor, "B T H L"]) -> Float[Tensor, "B T D"]:
        values = torch.einsum("bthl,hvl->bthv", inside, self._up(inside.dtype)[1])
        return self.out_proj(values.flatten(-2))

    def _up(self, dtype: torch.dtype) -> list[Tensor]:
        # What makes keys and values of the latent, head by head.
        weight = self.kv_proj.weight.to(dtype)
        return [part.unflatten(0, (self.config.num_heads, -1)) for part in weight.split(self.config._up())]
