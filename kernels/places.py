"""Where queries stand among the keys of their row, when they are only some of its tokens.

None says that queries and keys are the same tokens. Places rise along a row, so that what a few neighbouring
queries see lies in one stretch of the keys.

Letters: B rows, T queries, S keys.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from kernels.arguments import require, require_order, require_within

# Queries further apart than this are not neighbours: what one of them sees would be read for the other.
GAP = 128


class Span(NamedTuple):
    """Queries [start, stop) of all rows, and the stretch [low, high) of keys that they stand in."""

    start: int
    stop: int
    low: int
    high: int


def require_places(places: Int[Tensor, "B T"] | None, queries: int, keys: int, name: str = "k") -> None:
    """Refuses places outside the row or that fall along it, and without places another number of keys."""
    if places is None:
        require(keys == queries, name, f"{queries} tokens, as q without places", keys)
        return
    require_within("places", places, 0, keys)
    require_order("places", places)


def query_tokens(
    places: Int[Tensor, "B T"] | None, queries: int, like: Tensor, dtype: torch.dtype = torch.long
) -> Int[Tensor, "#B T"]:
    """The token in the row of keys that each query is, on the device of `like`."""
    if places is None:
        return torch.arange(queries, device=like.device, dtype=dtype)[None]
    return places.to(dtype)


def at_places(x: Int[Tensor, "B S"], places: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T"]:
    """What the queries have of a number of each token, such as its position."""
    return x if places is None else x.gather(1, places.long())


def queries_at_once(q: Tensor, numbers: int, limit: int) -> int:
    """How many queries to take at once where each needs so many numbers and memory holds `limit` of them.

    All of them on the meta device, which has no memory to save.
    """
    return q.shape[1] if q.is_meta else max(1, limit // max(1, numbers))


def spans(places: Int[Tensor, "B T"] | None, queries: int, size: int) -> list[Span]:
    """Neighbouring queries, at most `size` at a time; with places the host waits for them once.

    Places on the meta device are taken for the first tokens of the row: only shapes follow from them.
    """
    if places is None or places.is_meta:
        starts = range(0, queries, size)
        return [Span(a, min(a + size, queries), a, min(a + size, queries)) for a in starts]
    jumps = places.diff(dim=1).amax(0) > GAP
    edges = [0, *(jumps.nonzero().flatten() + 1).tolist(), queries]
    parts = [(a, min(a + size, stop)) for start, stop in pairwise(edges) for a in range(start, stop, size)]
    first = torch.tensor([a for a, _ in parts], device=places.device)
    last = torch.tensor([b - 1 for _, b in parts], device=places.device)
    bounds = torch.stack((places[:, first].amin(0), places[:, last].amax(0) + 1))
    return [Span(*part, *bound) for part, bound in zip(parts, bounds.T.tolist(), strict=True)]
