"""Softmax attention in which every query has its own list of keys."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.selected_attention.reference import selected_attention_gathered


class Case(NamedTuple):
    """One shape that tests and benchmarks share."""

    rows: int
    tokens: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    chosen: int


CASES = (
    Case(1, 1, 1, 1, 4, 4, 1),
    Case(2, 17, 4, 1, 8, 6, 5),
    Case(2, 33, 6, 2, 5, 8, 12),
    Case(1, 70, 4, 4, 8, 8, 100),
)


def selected_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    selection: Int[Tensor, "B T k"],
    *,
    scale: float,
    sinks: Float[Tensor, "H"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T k"]]:
    """Attention of each query over its chosen keys, and what all heads take of each, without gradient.

    selection: places in the row, each at most once, -1 for none; a query without any gets zeros. It is taken
    as given: it must hold no later token and none of another document. Query head h reads key head
    h // (H / G). sinks: one more score per head, without a value. Work is O(T k (K + V)) per head.

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    rows, tokens, heads, key_dim = q.shape
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require(k.shape[:2] == (rows, tokens) and k.shape[3] == key_dim, "k", "B, T, K as q", tuple(k.shape))
    require(v.shape[:3] == k.shape[:3], "v", "B, T, G as k", tuple(v.shape))
    require(heads % k.shape[2] == 0, "q", f"a multiple of {k.shape[2]} heads", heads)
    require(q.dtype == k.dtype == v.dtype, "k, v", f"dtype {q.dtype}, as q", (k.dtype, v.dtype))
    require(selection.shape[:2] == (rows, tokens), "selection", (rows, tokens, "k"), tuple(selection.shape))
    if sinks is not None:
        require(sinks.shape == (heads,), "sinks", (heads,), tuple(sinks.shape))
    return selected_attention_gathered(q, k, v, selection, scale=scale, sinks=sinks)
