"""Which earlier blocks of keys a query attends to: by its score with a block's mean key, or its best key."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require
from kernels.block_selection.reference import select_by_max_chunked, select_by_mean_chunked
from kernels.choose import takes_triton
from kernels.query_index import require_q_index


@checked
def select_by_mean(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    *,
    block: int,
    count: int,
    position: Int[Tensor, "B S"],
    q_index: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T H n"]:
    """Slots of the n <= count blocks before the query's own whose mean key scores highest with the query.

    Slots are those of `document_windows(position, block, block)`, best first, -1 where there are fewer. No
    gradient. In plain torch on every device: the means of blocks are few.
    q_index: index of each query in its row of keys, rising along the row; None where queries and keys are the
    same T = S tokens.
    MoBA, arXiv 2502.13189, equations 5 and 6.

    Raises ValueError for an argument of the wrong shape or range.
    """
    _check(q, k, block, count, q_index)
    return select_by_mean_chunked(q, k, block=block, count=count, position=position, q_index=q_index)


@checked
def select_by_max(
    q: Float[Tensor, "B T J K"],
    k: Float[Tensor, "B S 1 K"],
    *,
    block: int,
    count: int,
    local: int,
    position: Int[Tensor, "B S"],
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Int[Tensor, "B T J n"], Int[Tensor, "B T J m"]]:
    """Slots of the blocks before the query's own whose best key scores highest, and the index of that key.

    Slots, q_index and n as in `select_by_mean`. The last `local` blocks before the own one go first. The
    second result, m = n + 1, is the index in the row of the best key in the own block up to the query, then
    in each selected block; any index where the slot is -1. No gradient. The block selection of MiniMax-M3.

    Raises ValueError for an argument of the wrong shape or range.
    """
    _check(q, k, block, count, q_index)
    require(local >= 0, "local", "at least 0", local)
    options: dict[str, Any] = {"block": block, "count": count, "local": local}
    options |= {"position": position, "q_index": q_index}
    if takes_triton("block_selection", q):
        from kernels.block_selection.triton import select_by_max_triton

        return select_by_max_triton(q, k, **options)
    return select_by_max_chunked(q, k, **options)


def _check(q: Tensor, k: Tensor, block: int, count: int, q_index: Tensor | None) -> None:
    tokens, heads = q.shape[1:3]
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require_q_index(q_index, tokens, k.shape[1])
    require(heads % k.shape[2] == 0, "q", f"a multiple of {k.shape[2]} heads", heads)
    require(block > 0, "block", "at least 1", block)
    require(count >= 0, "count", "at least 0", count)
