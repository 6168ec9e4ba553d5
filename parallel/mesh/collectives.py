"""Collectives with their exact adjoints, under one law.

The objective is the sum over ranks of each rank's own terms. So what is gathered has gradients that are
summed and scattered, what is summed over ranks has gradients that are summed over ranks, and nothing is
ever averaged. Every function is the identity where the axis has one rank. All are collective: every rank of
the axis must call, in the same order, in forward and in backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh.axes import Axis

# torch 2.13 renamed them.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """The x of all ranks, one after the other along `dim`. Adjoint: `reduce_scatter`."""
    return x if axis.size == 1 else cast(Tensor, _Gather.apply(x, axis, dim))


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's part along `dim` of the sum of x over ranks, in float32 at least. Adjoint: `gather`.

    Raises ValueError where the axis does not divide the dim.
    """
    if axis.size == 1:
        return x
    if x.shape[dim] % axis.size:
        raise ValueError(f"{axis.name}: {axis.size} ranks do not divide dim {dim} of {tuple(x.shape)}")
    return cast(Tensor, _ReduceScatter.apply(x, axis, dim))


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """x summed over ranks. Adjoint: the same, since every rank's terms depend on the sum."""
    return x if axis.size == 1 else cast(Tensor, _Sum.apply(x, axis))


def sum_neighbours(x: Tensor, axis: Axis, count: int) -> Tensor:
    """x summed over the `count` neighbours along the axis that this rank is one of. Adjoint: the same.

    All of them get the same bits. Ranks of the whole axis must call, with as many numbers each: groups of
    neighbours have no process group of their own.
    """
    if count == 1:
        return x
    if count == axis.size:
        return sum_over(x, axis)
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % count))
    first, piece = axis.rank // count * count, flat.numel() // count
    counts = [piece * (first <= rank < first + count) for rank in range(axis.size)]
    # Each sums a piece, and gives it to the others.
    own = exchange(flat, axis, counts, counts).view(count, piece).sum(0)
    return exchange(own.repeat(count), axis, counts, counts)[: x.numel()].view(x.shape)


def exchange(x: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows of x sent in order of rank, `sent` to each, and `received` from each. Adjoint: the way back."""
    if axis.size == 1:
        return x
    return cast(Tensor, _Exchange.apply(x, axis, list(sent), list(received)))


@dataclass
class AsyncAllToAll:
    """`exchange` in two halves: what is called between `start` and `wait` overlaps it.

    Backward, the gradients of all that is called between overlap the way back.
    """

    axis: Axis
    sent: Sequence[int]
    received: Sequence[int]
    work: dist.Work | None = None
    returned: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        """What `exchange` will give for x, to be read only through `wait`."""
        return cast(Tensor, _StartExchange.apply(x, self))

    def wait(self, x: Tensor) -> Tensor:
        """What `start` gave, now that it is there."""
        return cast(Tensor, _WaitExchange.apply(x, self))

    def issue(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Begins to move the rows of x; what it gives is there after `finish`."""
        out = x.new_empty(sum(received), *x.shape[1:])
        self.work = dist.all_to_all_single(
            out, x.contiguous(), list(received), list(sent), group=self.axis.group, async_op=True
        )
        return out

    def finish(self) -> None:
        """Waits for the exchange that was issued last; on a GPU its stream does."""
        assert self.work is not None, "nothing was started"
        self.work.wait()


def swapped(x: Tensor, peer: int, axis: Axis) -> Tensor:
    """The tensor of the global rank `peer`, which gets x: both call it. Without a gradient."""
    own, other = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    operations = [
        dist.P2POp(dist.isend, own, peer, axis.group),
        dist.P2POp(dist.irecv, other, peer, axis.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return other


def gathered(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """`gather` without a gradient."""
    if axis.size == 1:
        return x
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty(axis.size * front.shape[0], *front.shape[1:])
    _gather_into(out, front, group=axis.group)
    return out.movedim(0, dim)


def scattered_sum(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """`reduce_scatter` without a gradient."""
    if axis.size == 1:
        return x
    front = x.movedim(dim, 0).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    out = front.new_empty(front.shape[0] // axis.size, *front.shape[1:])
    _reduce_into(out, front, group=axis.group)
    return out.to(x.dtype).movedim(0, dim)


def exchanged(x: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """`exchange` without a gradient."""
    if axis.size == 1:
        return x
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=axis.group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return gathered(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return scattered_sum(grads[0], ctx.axis, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return scattered_sum(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grads[0], ctx.axis, ctx.dim), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=ctx.axis.group)
        return out, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return exchanged(x, axis, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return exchanged(grads[0], ctx.axis, ctx.received, ctx.sent), None, None, None


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: AsyncAllToAll) -> Tensor:
        ctx.transfer = transfer
        return transfer.issue(x, transfer.sent, transfer.received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Begun by _WaitExchange; what came along the graph only has the shape of what was sent.
        ctx.transfer.finish()
        return ctx.transfer.returned, None


class _WaitExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: AsyncAllToAll) -> Tensor:
        ctx.transfer = transfer
        transfer.finish()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.returned = transfer.issue(grads[0], transfer.received, transfer.sent)
        return grads[0], None
