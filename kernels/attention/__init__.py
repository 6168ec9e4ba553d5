"""Causal softmax attention with grouped heads, windows and packed documents."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.attention.reference import attention_fused


class Case(NamedTuple):
    """One shape that tests and benchmarks share."""

    rows: int
    tokens: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    window: int | None


CASES = (
    Case(1, 1, 1, 1, 4, 4, None),
    Case(2, 17, 4, 2, 8, 8, None),
    Case(2, 33, 6, 2, 16, 8, 5),
    Case(1, 64, 4, 4, 8, 12, 1),
    Case(1, 130, 8, 1, 16, 16, 200),
)


def attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    scale: float,
    window: int | None = None,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Causal attention: each query over the keys before it, itself included, of its own document.

    Query head h reads key head h // (H / G). window counts the keys a query sees, itself included.
    document numbers the documents of a row in order. Work is O(T^2 (K + V)) per head.

    Raises ValueError for an argument of the wrong shape, dtype or range.
    """
    rows, tokens, heads, key_dim = q.shape
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require(k.shape[:2] == (rows, tokens) and k.shape[3] == key_dim, "k", "B, T, K as q", tuple(k.shape))
    require(v.shape[:3] == k.shape[:3], "v", "B, T, G as k", tuple(v.shape))
    require(heads % k.shape[2] == 0, "q", f"a multiple of {k.shape[2]} heads", heads)
    require(q.dtype == k.dtype == v.dtype, "k, v", f"dtype {q.dtype}, as q", (k.dtype, v.dtype))
    require(window is None or window > 0, "window", "None or at least 1", window)
    if document is not None:
        require(document.shape == (rows, tokens), "document", (rows, tokens), tuple(document.shape))
    return attention_fused(q, k, v, scale=scale, window=window, document=document)
