"""Index of each query in its row of keys, for queries that are only some of the row's tokens.

`q_index` of None says that queries and keys are the same tokens. Otherwise it rises along a row, so that
the keys which neighbouring queries see lie close together.

Letters: B rows, T queries, S keys.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from kernels.arguments import require, require_order, require_within

# A chunk reads all keys between its first and its last query, so it holds none that are further apart.
MAX_GAP = 128


class QueryChunk(NamedTuple):
    """Queries [start, stop) of all rows, and the keys [key_start, key_stop) that they are among."""

    start: int
    stop: int
    key_start: int
    key_stop: int


def require_q_index(q_index: Int[Tensor, "B T"] | None, queries: int, keys: int, name: str = "k") -> None:
    """Refuses an index outside the row or that falls along it; without one, another number of keys."""
    if q_index is None:
        require(keys == queries, name, f"{queries} tokens, as q without q_index", keys)
        return
    require_within("q_index", q_index, 0, keys)
    require_order("q_index", q_index)


def q_index_or_arange(
    q_index: Int[Tensor, "B T"] | None, queries: int, like: Tensor, dtype: torch.dtype = torch.long
) -> Int[Tensor, "#B T"]:
    """Index of each query in its row of keys, 0, 1, 2, ... without q_index; on the device of `like`."""
    if q_index is None:
        return torch.arange(queries, device=like.device, dtype=dtype)[None]
    return q_index.to(dtype)


def at_queries(x: Int[Tensor, "B S"], q_index: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T"]:
    """The elements of x, which has one per key, that belong to the queries."""
    return x if q_index is None else x.gather(1, q_index.long())


def queries_per_chunk(q: Tensor, elements: int, limit: int) -> int:
    """How many queries to take at a time if each needs so many elements and memory holds `limit` of them.

    All of them on the meta device, which has no memory to save.
    """
    return q.shape[1] if q.is_meta else max(1, limit // max(1, elements))


def query_chunks(q_index: Int[Tensor, "B T"] | None, queries: int, size: int) -> list[QueryChunk]:
    """Chunks of at most `size` neighbouring queries; with q_index the host waits once for the device.

    On the meta device queries are taken for the first tokens of the row: only shapes follow from them.
    """
    if q_index is None or q_index.is_meta:
        starts = range(0, queries, size)
        return [QueryChunk(a, min(a + size, queries), a, min(a + size, queries)) for a in starts]
    jumps = q_index.diff(dim=1).amax(0) > MAX_GAP
    edges = [0, *(jumps.nonzero().flatten() + 1).tolist(), queries]
    parts = [(a, min(a + size, stop)) for start, stop in pairwise(edges) for a in range(start, stop, size)]
    first = torch.tensor([a for a, _ in parts], device=q_index.device)
    last = torch.tensor([b - 1 for _, b in parts], device=q_index.device)
    bounds = torch.stack((q_index[:, first].amin(0), q_index[:, last].amax(0) + 1))
    return [QueryChunk(*part, *bound) for part, bound in zip(parts, bounds.T.tolist(), strict=True)]
