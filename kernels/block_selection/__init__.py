"""Which earlier blocks of keys a query attends to: by the mean of a block's keys, or by its best key."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require
from kernels.block_selection.reference import select_by_mean_slabs, select_by_peak_slabs
from kernels.choose import takes_triton
from kernels.places import require_places


@checked
def select_by_mean(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    *,
    block: int,
    count: int,
    position: Int[Tensor, "B S"],
    places: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T H n"]:
    """Slots of the blocks before the query's own whose mean key goes best with the query; n is at most count.

    Slots are those of `document_windows(position, block, block)`, best first, -1 where there are fewer. No
    gradient. In plain torch on every device: the means of blocks are few.
    places: where the queries stand among the keys, rising along a row; None is T = S, all tokens in order.
    MoBA, arXiv 2502.13189, equations 5 and 6.

    Raises ValueError for an argument of the wrong shape or range.
    """
    _check(q, k, block, count, places)
    return select_by_mean_slabs(q, k, block=block, count=count, position=position, places=places)


@checked
def select_by_peak(
    q: Float[Tensor, "B T J K"],
    k: Float[Tensor, "B S 1 K"],
    *,
    block: int,
    count: int,
    local: int,
    position: Int[Tensor, "B S"],
    places: Int[Tensor, "B T"] | None = None,
) -> tuple[Int[Tensor, "B T J n"], Int[Tensor, "B T J m"]]:
    """Slots of the blocks before the query's own with the best single key, and the best keys themselves.

    The last `local` blocks before the own one go first. m = n + 1: the token of the best key in the own block
    up to the query, then in each selected block; any token for a selected block of -1. No gradient.
    places as in `select_by_mean`; the best keys are places among the keys too.

    Raises ValueError for an argument of the wrong shape or range.
    """
    _check(q, k, block, count, places)
    require(local >= 0, "local", "at least 0", local)
    options: dict[str, Any] = {"block": block, "count": count, "local": local}
    options |= {"position": position, "places": places}
    if takes_triton("block_selection", q):
        from kernels.block_selection.triton import select_by_peak_triton

        return select_by_peak_triton(q, k, **options)
    return select_by_peak_slabs(q, k, **options)


def _check(q: Tensor, k: Tensor, block: int, count: int, places: Tensor | None) -> None:
    tokens, heads = q.shape[1:3]
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require_places(places, tokens, k.shape[1])
    require(heads % k.shape[2] == 0, "q", f"a multiple of {k.shape[2]} heads", heads)
    require(block > 0, "block", "at least 1", block)
    require(count >= 0, "count", "at least 0", count)
