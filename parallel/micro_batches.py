"""What goes through a model at a time, and the objective that its losses make."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.loader import Batch
from kernels.cross_entropy import IGNORED
from model.language_model import LanguageModel, Losses
from model.mixer import Sequence
from model.mtp import shift_rows
from parallel.shard.fsdp import reduce_over_copies


class MicroBatch(NamedTuple):
    """Rows that go through a model together: this rank's tokens of them."""

    targets: Int[Tensor, "B T"]
    sequence: Sequence


class Denominators(NamedTuple):
    """What the losses of the whole global batch are divided by.

    targets: of the head, then of each MTP module, whose mean loss counts `mtp_coefficient` times.
    """

    targets: Int[Tensor, "P1"]
    tokens: int
    mtp_coefficient: float


# Of the hidden states [B P D] of this rank's tokens one [D], the same on all ranks that share the rows.
Pick = Callable[[Tensor], Tensor]


@runtime_checkable
class Runner(Protocol):
    """Runs this rank's part of a model."""

    def step(self, batches: Items[MicroBatch], denominators: Denominators) -> Losses:
        """Forward and backward of all micro-batches. Adds to gradients; gives this rank's sums, detached."""
        ...

    def score(self, batch: MicroBatch) -> Float[Tensor, ""]:
        """This rank's share of the summed cross-entropy, without gradients and without dropout."""
        ...

    def logits(self, batch: MicroBatch, pick: Pick) -> Float[Tensor, "M"]:
        """The logits of this rank's part of the vocabulary after the hidden state that `pick` gives.

        The same on all ranks of a pipeline. Without gradients and without dropout.
        """
        ...


class WholeModel:
    """Runs a model all of whose layers are here, one micro-batch after the other."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def step(self, batches: Items[MicroBatch], denominators: Denominators) -> Losses:
        """Forward and backward of all micro-batches. Adds to gradients; gives this rank's sums, detached."""
        total: Losses | None = None
        for index, (targets, sequence) in enumerate(batches):
            reduce_over_copies(self._model, is_last=index + 1 == len(batches))
            losses = self._model.loss(sequence.tokens, targets, sequence)
            objective_of(losses, denominators).backward()
            total = added(total, losses)
        assert total is not None, "a step has a micro-batch at least"
        return total

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> Float[Tensor, ""]:
        """This rank's share of the summed cross-entropy, without gradients and without dropout."""
        was_training = self._model.training
        self._model.eval()
        losses = self._model.loss(batch.sequence.tokens, batch.targets, batch.sequence)
        self._model.train(was_training)
        return losses.cross_entropy

    @torch.no_grad()
    def logits(self, batch: MicroBatch, pick: Pick) -> Float[Tensor, "M"]:
        """The logits of this rank's part of the vocabulary after the hidden state that `pick` gives."""
        was_training = self._model.training
        self._model.eval()
        logits = self._model.part_logits(None, batch.sequence, pick)
        self._model.train(was_training)
        return logits


def objective_of(losses: Losses, denominators: Denominators) -> Float[Tensor, ""]:
    """What backward starts from: every loss over its global count."""
    targets = denominators.targets.clamp(min=1)
    objective = (losses.cross_entropy + losses.logit_z[0]) / targets[0]
    if len(losses.mtp):
        ahead = ((losses.mtp + losses.logit_z[1:]) / targets[1:]).mean()
        objective = objective + ahead * denominators.mtp_coefficient
    for part in losses.auxiliary.values():
        objective = objective + part / denominators.tokens
    return objective


def undivided(batch: MicroBatch, mtp_depth: int) -> Denominators:
    """Those of losses that are read as sums."""
    return Denominators(batch.targets.new_ones(1 + mtp_depth), 1, 0.0)


def count_targets(batch: Batch, mtp_depth: int) -> Int[Tensor, "P1"]:
    """The targets of the head in whole rows, then those of each MTP module."""
    rows = batch.tokens, batch.targets, batch.document
    shifted = [shift_rows(*rows, offset).targets for offset in range(1, mtp_depth + 1)]
    return torch.stack([(targets != IGNORED).sum() for targets in (batch.targets, *shifted)])


def added(total: Losses | None, losses: Losses) -> Losses:
    """The sums so far with those of one more micro-batch, detached."""
    parts = [part.detach() for part in losses.parts()]
    if total is not None:
        parts = [a + b for a, b in zip(total.parts(), parts, strict=True)]
    return losses.with_parts(parts)
