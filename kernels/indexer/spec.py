"""The indexer on drawn inputs."""

import torch
from torch import Tensor

from kernels.attention.reference import attention_direct
from kernels.indexer.loss import index_loss_direct
from kernels.indexer.reference import choose_directly, entry_tokens, last_tokens, visible_entries
from kernels.indexer.shapes import SHAPES, Shape
from kernels.indexer.triton import Tiles, index_select_triton
from kernels.indexer.triton_loss import ChosenTiles, index_loss_full_triton, index_loss_selected_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec

# Two tokens to an entry, every other time.
POOL = 2


def _tiles(factory: InputFactory) -> Tiles | None:
    return Tiles(16, 16, 64, 16, 1) if factory.uses_small_tiles else None


def _last(shape: Shape, factory: InputFactory, position: Tensor, *, pools: bool) -> Tensor | None:
    """The last tokens of pools of tokens, -1 in slots without one."""
    if not pools:
        return None
    slots = max(1, shape.tokens // POOL)
    is_last = position % POOL == POOL - 1
    rank = torch.where(is_last, is_last.long().cumsum(1) - 1, slots)
    index = torch.arange(shape.tokens, device=factory.device).expand(shape.rows, -1)
    last = torch.full((shape.rows, slots + 1), -1, dtype=torch.long, device=factory.device)
    return last.scatter_(1, rank, index)[:, :slots]


def draw_selection(shape: Shape, factory: InputFactory) -> KernelCase:
    """Small whole numbers: their scores are exact and often equal, so that ties count."""
    document, position = factory.documents(shape.rows, shape.tokens)
    last = _last(shape, factory, position, pools=shape.pools)
    count = shape.tokens if last is None else last.shape[1]
    numbers = {"low": -2, "high": 3, "dtype": factory.dtype}
    inputs = {
        "q": factory.integers(shape.rows, shape.tokens, shape.index_heads, shape.index_dim, **numbers),
        "k": factory.integers(shape.rows, count, shape.index_dim, **numbers),
        "weights": factory.integers(shape.rows, shape.tokens, shape.index_heads, **numbers),
    }
    options = {"top_k": shape.top_k, "last": last, "document": document}
    return KernelCase(
        inputs,
        lambda q, k, weights: (index_select_triton(q, k, weights, **options, tiles=_tiles(factory)),),
        lambda q, k, weights: (choose_directly(q, k, weights, **options),),
    )


def draw_chosen(shape: Shape, factory: InputFactory, *, is_deterministic: bool = False) -> KernelCase:
    """Any entries of the row, some of none, some queries with nothing to learn from."""
    rows, tokens, count = shape.rows, shape.tokens, shape.top_k
    inputs = {
        "q": factory.normal(rows, tokens, shape.index_heads, shape.index_dim),
        "k": factory.normal(rows, tokens, shape.index_dim),
        "weights": factory.normal(rows, tokens, shape.index_heads, scale=0.3),
    }
    if factory.device.type == "meta":
        entries = torch.empty(rows, tokens, count, dtype=torch.int64, device="meta")
    else:
        entries = factory.uniform(rows, tokens, max(tokens, count)).argsort(-1)[..., :count]
        entries = torch.where(entries < tokens, entries, -1)
        entries = entries.masked_fill(factory.integers(*entries.shape, low=0, high=5) == 0, -1)
    shares = factory.uniform(rows, tokens, count).masked_fill(entries < 0, 0.0)
    shares = shares * (factory.integers(rows, tokens, 1, low=0, high=5) > 0)

    def reference(q, k, weights):
        index = torch.where(entries < 0, tokens, entries)
        spread = torch.zeros(rows, tokens, tokens + 1, dtype=q.dtype)
        mass = spread.scatter(2, index, shares.to(q.dtype))[..., :tokens]
        visible = spread.scatter(2, index, 1.0)[..., :tokens] > 0
        return (index_loss_direct(q, k, weights, mass, visible),)

    tiles = ChosenTiles(16, 1) if factory.uses_small_tiles else None
    options = {"is_deterministic": is_deterministic, "tiles": tiles}
    return KernelCase(
        inputs,
        lambda q, k, weights: (index_loss_selected_triton(q, k, weights, entries, shares, **options),),
        reference,
    )


def draw_chosen_in_order(shape: Shape, factory: InputFactory) -> KernelCase:
    """The same with sums in a fixed order."""
    return draw_chosen(shape, factory, is_deterministic=True)


def draw_full(shape: Shape, factory: InputFactory) -> KernelCase:
    """All entries that a query sees, beside an attention of grouped heads."""
    rows, tokens, heads = shape.rows, shape.tokens, shape.heads
    document, position = factory.documents(rows, tokens)
    last = _last(shape, factory, position, pools=shape.pools)
    size = POOL if shape.pools else 1
    count = tokens if last is None else last.shape[1]
    groups = 1 if heads % 2 else heads // 2
    attention_q = factory.normal(rows, tokens, heads, shape.key_dim)
    attention_k = factory.normal(rows, tokens, groups, shape.key_dim)
    scale = shape.key_dim**-0.5
    if factory.device.type == "meta":
        lse = torch.empty(rows, tokens, heads, device="meta")
    else:
        q, k = attention_q.double(), attention_k.double()
        lse = attention_direct(q, k, k, scale=scale, document=document)[1]
    inputs = {
        "q": factory.normal(rows, tokens, shape.index_heads, shape.index_dim),
        "k": factory.normal(rows, count, shape.index_dim),
        "weights": factory.normal(rows, tokens, shape.index_heads, scale=0.3),
    }
    options = {"scale": scale, "last": last, "size": size, "document": document}

    def reference(q, k, weights):
        keys = attention_k.double().repeat_interleave(heads // groups, dim=2)
        scores = torch.einsum("bthk,bshk->bhts", attention_q.double(), keys) * scale
        mass = (scores - lse.mT[..., None]).exp().sum(1)
        last_token = last_tokens(k, last)
        if last is not None:
            members = entry_tokens(last, size).flatten(1)[:, None].expand(-1, tokens, -1)
            mass = mass.gather(2, members).unflatten(2, (-1, size)).sum(3)
        visible = visible_entries(0, tokens, last_token, document)
        return (index_loss_direct(q, k, weights, mass.to(q.dtype), visible),)

    return KernelCase(
        inputs,
        lambda q, k, weights: (
            index_loss_full_triton(
                q, k, weights, attention_q, attention_k, lse.float(), **options, tiles=_tiles(factory)
            ),
        ),
        reference,
    )


def selection_cost(shape: Shape) -> KernelCost:
    """Products of all causal pairs, and their scores written and read once in float32."""
    pairs = shape.rows * shape.tokens**2 / 2
    return KernelCost(2.0 * pairs * shape.index_heads * shape.index_dim, 8.0 * pairs, 0.0, 0.0)


def chosen_cost(shape: Shape) -> KernelCost:
    """Three products of chosen pairs, all of them in forward; bytes in bfloat16 of queries, twice."""
    lines = shape.rows * shape.tokens * shape.index_heads * shape.index_dim
    return KernelCost(6.0 * lines * min(shape.top_k, shape.tokens), 4.0 * lines, 0.0, 4.0 * lines)


def full_cost(shape: Shape) -> KernelCost:
    """Products of all causal pairs: the attention's, and three of the indexer's, all in forward."""
    pairs = shape.rows * shape.tokens**2 / 2
    flops = 2.0 * pairs * (shape.heads * shape.key_dim + 3 * shape.index_heads * shape.index_dim)
    return KernelCost(flops, 16.0 * pairs, 0.0, 0.0)


def dsa(tokens: int) -> Shape:
    """DeepSeek-V3.2: 64 index heads of 128 dims beside 128 heads of 192."""
    return Shape(1, tokens, 64, 128, 128, 192, min(2048, tokens))


# The interpreter takes a query at a time.
SMALL_SHAPES = tuple(Shape(1, min(20, c.tokens), *c[2:]) for c in SHAPES)
SPECS = (
    KernelSpec("indexer.selection", SMALL_SHAPES, dsa, draw_selection, selection_cost),
    KernelSpec("indexer.chosen", SMALL_SHAPES, dsa, draw_chosen, chosen_cost),
    KernelSpec("indexer.chosen_in_order", SMALL_SHAPES[1:3], dsa, draw_chosen_in_order, chosen_cost),
    KernelSpec("indexer.full", SHAPES, dsa, draw_full, full_cost),
)
