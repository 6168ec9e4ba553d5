"""Held-out loss in nats per token and bits per byte."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from data.loader import Loader
from kernels.cross_entropy import IGNORED
from parallel.context.sharding import cut_rows
from parallel.mesh.world import World
from parallel.micro_batches import Runner
from train.loop.step import to_device


class Evaluation(NamedTuple):
    """Loss on held-out documents. bits_per_byte is exact only over all of them, else an estimate."""

    loss: float
    bits_per_byte: float
    targets: int


def evaluate(
    runner: Runner,
    loader: Loader,
    world: World,
    *,
    rows: int,
    micro_batch: int,
    mtp_depth: int = 0,
    before_round: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The loss over the first `rows` held-out windows, shared out over the ranks.

    The dataset must hold out at least one document. mtp_depth: how many MTP modules there are. before_round
    is called by all ranks, before each round of batches; what it raises ends the evaluation.
    """
    rows = min(rows, loader.held_out_rows)
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    ranks = world.axes.batch
    stride = ranks.size * micro_batch
    for start in range(0, rows, stride):
        before_round()
        # Every rank runs every round, also with nothing to count: sharded weights are gathered together.
        first = start + ranks.rank * micro_batch
        batch = to_device(loader.held_out(first, micro_batch), world.device)
        targets = batch.targets.clone()
        targets[max(0, rows - first) :] = IGNORED
        own = cut_rows(batch._replace(targets=targets), world.axes.cp, mtp_depth=mtp_depth)
        totals[0] += runner.score(own).double()
        # Ranks that share rows have losses of their own tokens and layers, and one count.
        totals[1] += (targets != IGNORED).sum() * (world.axes.sequence.rank == 0 and world.axes.pp.rank == 0)
    world.sum(totals)
    nats, count = totals.tolist()
    # The first token of a document is given, all others are predicted: exact over all documents.
    card = loader.card.held_out
    bytes_per_target = (card.bytes - card.given_bytes) / (card.tokens - card.documents)
    return Evaluation(nats / count, nats / math.log(2) / (count * bytes_per_target), int(count))
