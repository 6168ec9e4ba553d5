"""The logits of the next token of a row, the same on every rank of any layout."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from data.loader import Batch
from kernels.cross_entropy import IGNORED
from model.mixer import Sequence
from parallel.context.chunks import cut_row
from parallel.context.sharding import cut_rows
from parallel.mesh.axes import Axes
from parallel.mesh.collectives import gathered, sum_over
from parallel.mesh.world import World
from parallel.micro_batches import Runner


def next_logits(runner: Runner, ids: Int[Tensor, "T"], world: World, context: int) -> Float[Tensor, "V"]:
    """Logits of the whole vocabulary after the ids, which every rank is given. Collective.

    The row is filled up behind the ids where ranks share it out: to a multiple of the tensor axis, and to
    `context` tokens, which the layout was checked for, where the context axis cuts it.
    """
    axes, count = world.axes, ids.shape[0]
    length = context if axes.cp.size > 1 else -(-count // axes.tp.size) * axes.tp.size
    row = row_of(ids, length)
    batch = cut_rows(row, axes.cp)
    if length == count and axes.cp.size == 1:
        # Without a mask of documents.
        batch = batch._replace(sequence=Sequence.whole(row.tokens))
    logits = runner.logits(batch, partial(picked, last=count - 1, length=length, axes=axes))
    return gathered(logits, axes.tp)


def row_of(ids: Int[Tensor, "T"], length: int) -> Batch:
    """One row: a document of the ids, and one of token 0 up to the length. Nothing is a target."""
    index = torch.arange(length, device=ids.device)
    document = (index >= ids.shape[0]).long()
    position = index - document * ids.shape[0]
    tokens = pad(ids, (0, length - ids.shape[0]))
    row = tokens[None], torch.full_like(tokens, IGNORED)[None], document[None], position[None]
    return Batch(*row, torch.zeros(1, dtype=torch.int64))


def picked(x: Float[Tensor, "1 P D"], *, last: int, length: int, axes: Axes) -> Float[Tensor, "D"]:
    """The hidden state of token `last` of the row, of which this rank has some tokens. Collective."""
    own = cut_row(torch.arange(length, device=x.device)[None], axes.cp)
    own = own.unflatten(1, (axes.tp.size, -1))[0, axes.tp.rank]
    return sum_over(x[0].masked_fill((own != last)[:, None], 0.0).sum(0), axes.sequence)
