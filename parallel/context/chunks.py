"""The head-tail sharding of rows over the ranks of the context axis, and what moves between chunks.

A row has 2 R chunks of c tokens; rank r holds chunk r in front and chunk 2 R - 1 - r behind it, so that
causal work is even. Letters: B rows, R ranks, c tokens of a chunk, T = 2 c tokens of a row on one rank,
S = 2 R c tokens of a row.
"""

import torch
from jaxtyping import Shaped
from torch import Tensor

from parallel.mesh.axes import Axis
from parallel.mesh.collectives import exchange, gather


def cut_row(x: Shaped[Tensor, "B S *E"], axis: Axis) -> Shaped[Tensor, "B T *E"]:
    """This rank's chunks of whole rows.

    Raises ValueError where rows do not have a multiple of 2 R tokens.
    """
    if axis.size == 1:
        return x
    count = 2 * axis.size
    if x.shape[1] % count:
        raise ValueError(f"{axis.name}: {x.shape[1]} tokens are not a multiple of 2 x {axis.size} ranks")
    chunks = x.unflatten(1, (count, -1))
    return torch.cat((chunks[:, axis.rank], chunks[:, count - 1 - axis.rank]), 1)


def whole_row(x: Shaped[Tensor, "B T *E"], axis: Axis) -> Shaped[Tensor, "B S *E"]:
    """The rows of all ranks in order; the adjoint sums the gradients of all ranks and cuts them."""
    if axis.size == 1:
        return x
    parts = gather(x[None], axis).unflatten(2, (2, -1))
    fronts, backs = parts[:, :, 0], parts[:, :, 1].flip(0)
    return torch.cat((fronts, backs)).transpose(0, 1).flatten(1, 2)


def split_chunks(x: Shaped[Tensor, "B T *E"]) -> Shaped[Tensor, "X c *E"]:
    """Both chunks of each row as rows of their own, front first; X = 2 B."""
    return x.unflatten(1, (2, -1)).flatten(0, 1)


def join_chunks(x: Shaped[Tensor, "X c *E"]) -> Shaped[Tensor, "B T *E"]:
    """The inverse of `split_chunks`."""
    return x.unflatten(0, (-1, 2)).flatten(1, 2)


def tails_before(x: Shaped[Tensor, "B T *E"], axis: Axis, count: int) -> Shaped[Tensor, "X U *E"]:
    """The U = count tokens before each chunk, zeros before the first of a row; rows as of `split_chunks`.

    Two neighbours send `count` tokens each where a chunk has as many; where not, whole rows are gathered.
    """
    rows, size = x.shape[0], x.shape[1] // 2
    if count > size:
        return _tails_of_rows(x, axis, count)
    front, back = x[:, size - count : size], x[:, 2 * size - count :]
    rank, last = axis.rank, axis.size - 1
    # Fronts move to the next rank, backs to the one before; the last rank's two chunks are neighbours.
    sent = [0] * axis.size
    received = [0] * axis.size
    if rank < last:
        sent[rank + 1] = received[rank + 1] = rows
    if rank > 0:
        sent[rank - 1] = received[rank - 1] = rows
    moving = ([back] if rank > 0 else []) + ([front] if rank < last else [])
    arrived = exchange(torch.cat(moving), axis, sent, received) if moving else x[:0, :count]
    parts = list(arrived.split(rows)) if arrived.shape[0] else []
    # From the rank before comes what precedes the front, from the one after what precedes the back.
    before_front = parts.pop(0) if rank > 0 else torch.zeros_like(front)
    before_back = parts.pop(0) if rank < last else front
    return torch.stack((before_front, before_back), 1).flatten(0, 1)


def _tails_of_rows(x: Tensor, axis: Axis, count: int) -> Tensor:
    size = x.shape[1] // 2
    row = whole_row(x, axis)
    padded = torch.cat((row.new_zeros(row.shape[0], count, *row.shape[2:]), row), 1)
    starts = (axis.rank * size, (2 * axis.size - 1 - axis.rank) * size)
    return torch.stack([padded[:, start : start + count] for start in starts], 1).flatten(0, 1)
