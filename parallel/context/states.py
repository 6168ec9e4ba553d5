"""States of linear recurrences across the chunks of rows that are sharded over ranks.

The affine maps of all chunks of a head go to one rank, its owner, which walks along the row and sends every
chunk the state that enters it; backward, gradients go the same way from the end of the row. What moves does
not depend on the number of tokens, and per rank hardly on the number of ranks.

Letters: B rows, R ranks, J = 2 R chunks of a row, X = 2 B chunks of this rank, H heads, h heads that this
rank owns, *S dims of one head's state, P numbers.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.recurrence import Recurrence, Summary
from parallel.mesh.axes import Axis
from parallel.mesh.collectives import exchanged


class Starts(NamedTuple):
    """The state that enters each chunk of this rank, and the factors that `pass_back` takes.

    factors are M of all chunks for the heads that this rank owns, zero where nothing passes.
    """

    states: Float[Tensor, "X H *S"]
    factors: Float[Tensor, "J h B *M"]


@torch.no_grad()
def start_states(recurrence: Recurrence, summary: Summary, passes: Bool[Tensor, "X"], axis: Axis) -> Starts:
    """What the chunks before leave in the state, which is zero where a row starts. No gradients.

    passes: whether the document of the chunk's last token began before the chunk, so that something of the
    state before comes through. The states are those of the document that ends the chunk before.
    """
    transition, added = summary.transition, summary.added
    chunks, heads = added.shape[:2]
    through = passes.to(added.dtype)[:, None, None].expand(-1, heads, 1)
    parts = [through, *(part.reshape(chunks, heads, -1) for part in (transition, added))]
    owned = _to_owners(torch.cat(parts, 2), axis)
    through, moved, written = owned.split([part.shape[2] for part in parts], dim=3)
    moved, written = (
        part.reshape(*owned.shape[:3], *like.shape[2:])
        for part, like in ((moved, transition), (written, added))
    )
    factors = recurrence.factor(moved, _owned(heads, axis))
    factors = factors * through.reshape(*owned.shape[:3], *[1] * (factors.ndim - 3))
    states = torch.zeros_like(written)
    for chunk in range(1, len(states)):
        carried = _times(factors[chunk - 1], states[chunk - 1], is_matrix=recurrence.is_matrix)
        states[chunk] = carried + written[chunk - 1]
    return Starts(_from_owners(states, heads, axis), factors)


@torch.no_grad()
def end_gradients(
    grad_start: Float[Tensor, "X H *S"], factors: Float[Tensor, "J h B *M"], axis: Axis, *, is_matrix: bool
) -> Float[Tensor, "X H *S"]:
    """Gradient of the state that leaves each chunk, from what the outputs of each ask of its first state."""
    chunks, heads = grad_start.shape[:2]
    asked = _to_owners(grad_start.reshape(chunks, heads, -1), axis)
    asked = asked.reshape(*asked.shape[:3], *grad_start.shape[2:])
    turned = factors.mT if is_matrix else factors
    grads = torch.zeros_like(asked)
    for chunk in reversed(range(1, len(grads))):
        grads[chunk - 1] = _times(turned[chunk], grads[chunk], is_matrix=is_matrix) + asked[chunk]
    return _from_owners(grads, heads, axis)


def pass_back(
    out: Float[Tensor, "X C *E"],
    end: Float[Tensor, "X H *S"],
    recurrence: Recurrence,
    kept: tuple[Tensor | None, ...],
    goes_on: Bool[Tensor, "X"],
    factors: Float[Tensor, "J h B *M"],
    axis: Axis,
) -> Float[Tensor, "X C *E"]:
    """out; its gradient gives the last states `end` that of all chunks after, over all ranks.

    goes_on: whether a chunk's first token goes on with the document of the chunk before. One backward of the
    recurrence with both gradients is then that of the whole row: states between chunks need no other path.
    """
    return cast(Tensor, _PassBack.apply(out, end, recurrence, axis, goes_on, factors, *kept))


class _PassBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        end: Tensor,
        recurrence: Recurrence,
        axis: Axis,
        goes_on: Tensor,
        factors: Tensor,
        *kept: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(goes_on, factors, *kept)
        ctx.axis, ctx.end_dtype = axis, end.dtype
        ctx.is_matrix, ctx.initial_state_grad = recurrence.is_matrix, recurrence.initial_state_grad
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        goes_on, factors, *kept = ctx.saved_tensors
        asked = ctx.initial_state_grad(grads[0], *kept)
        asked = asked * goes_on.view(-1, *[1] * (asked.ndim - 1))
        grad_end = end_gradients(asked.to(factors.dtype), factors, ctx.axis, is_matrix=ctx.is_matrix)
        return grads[0], grad_end.to(ctx.end_dtype), *[None] * (4 + len(kept))


def _times(factor: Tensor, state: Tensor, *, is_matrix: bool) -> Tensor:
    return factor @ state if is_matrix else factor * state


def _counts(heads: int, axis: Axis) -> list[int]:
    # Heads of each owner; the first own one more where the ranks do not divide them.
    return [heads // axis.size + (rank < heads % axis.size) for rank in range(axis.size)]


def _owned(heads: int, axis: Axis) -> slice:
    counts = _counts(heads, axis)
    first = sum(counts[: axis.rank])
    return slice(first, first + counts[axis.rank])


def _to_owners(x: Float[Tensor, "X H P"], axis: Axis) -> Float[Tensor, "J h B P"]:
    # Chunks come in the order of the row: fronts of all ranks, then their backs from the last rank on.
    counts = _counts(x.shape[1], axis)
    own = counts[axis.rank]
    heads = x.unflatten(0, (-1, 2)).permute(2, 1, 0, 3)
    arrived = exchanged(heads, axis, counts, [own] * axis.size)
    arrived = arrived.reshape(axis.size, own, *heads.shape[1:])
    return torch.cat((arrived[:, :, 0], arrived[:, :, 1].flip(0)))


def _from_owners(x: Float[Tensor, "J h B *S"], heads: int, axis: Axis) -> Float[Tensor, "X H *S"]:
    fronts, backs = x[: axis.size], x[axis.size :].flip(0)
    leaving = torch.stack((fronts, backs), 2).flatten(0, 1)
    counts = _counts(heads, axis)
    arrived = exchanged(leaving, axis, [x.shape[1]] * axis.size, counts)
    return arrived.movedim(0, 2).transpose(0, 1).flatten(0, 1)
