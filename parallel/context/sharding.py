"""The head-tail sharding of rows as mixers meet it."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from data.loader import Batch
from model.mixer import Sequence, ShiftedTokens
from model.mtp import shift_rows
from model.recurrence import Recurrence
from model.sequence_sharding import SequenceSharding
from parallel.context.chunks import cut_row, join_chunks, split_chunks, tails_before
from parallel.context.states import pass_back, start_states
from parallel.context.view import HeadTailViews
from parallel.mesh.axes import Axis
from parallel.micro_batches import MicroBatch


class HeadTailSharding(HeadTailViews, SequenceSharding):
    """Rows in two chunks per rank of the context axis. before, recur and what views give are collective."""

    def before(self, x: Float[Tensor, "B T *E"], count: int) -> Float[Tensor, "X U *E"]:
        """The U = count tokens before each chunk, zeros before the first of a row."""
        return tails_before(x, self.axis, count)

    def chunks(self, x: Shaped[Tensor, "B T *E"]) -> Shaped[Tensor, "X C *E"]:
        """Both chunks of each row as rows of their own; X = 2 B."""
        return split_chunks(x)

    def restore(self, x: Shaped[Tensor, "X C *E"]) -> Shaped[Tensor, "B T *E"]:
        """The inverse of `chunks`."""
        return join_chunks(x)

    def recur(
        self,
        recurrence: Recurrence,
        inputs: tuple[Tensor, ...],
        position: Int[Tensor, "B T"],
        document: Int[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B T *E"]:
        """Outputs; a state passes from chunk to chunk while its document goes on.

        Two passes over the tokens forward, the first of them for the affine maps of the chunks. Four
        exchanges between all ranks, two of them in backward, of states and no tokens.
        """
        chunks = tuple(self.chunks(x) for x in inputs)
        document = None if document is None else self.chunks(document)
        position = self.chunks(position)
        goes_on, passes = position[:, 0] > 0, position[:, -1] >= position.shape[1]
        with torch.no_grad():
            summary = recurrence.summarize(chunks, document)
        states, factors = start_states(recurrence, summary, passes, self.axis)
        states = states * goes_on.view(-1, *[1] * (states.ndim - 1))
        out, final = recurrence.run(chunks, document, states)
        out = pass_back(out, final, recurrence, summary.kept, goes_on, factors, self.axis)
        return self.restore(out)


def cut_rows(batch: Batch, axis: Axis, *, uniform: float | None = None, mtp_depth: int = 0) -> MicroBatch:
    """This rank's tokens of the rows of a batch. mtp_depth: how many MTP modules there are.

    Raises ValueError where a row does not have a multiple of 2 R tokens.
    """
    if axis.size == 1:
        return MicroBatch(batch.targets, Sequence(batch.position, batch.document, batch.tokens, uniform))
    every = (shift_rows(batch.tokens, batch.targets, batch.document, n) for n in range(1, mtp_depth + 1))
    shifted = tuple(ShiftedTokens(cut_row(one.tokens, axis), cut_row(one.targets, axis)) for one in every)
    position, document, tokens = (cut_row(x, axis) for x in (batch.position, batch.document, batch.tokens))
    sequence = Sequence(
        position,
        document,
        tokens,
        uniform,
        shifted,
        sharding=HeadTailSharding(axis, batch.position, batch.document),
    )
    return MicroBatch(cut_row(batch.targets, axis), sequence)
