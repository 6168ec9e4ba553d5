"""One optimizer step: forward and backward over micro-batches, global sums, clip, update."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from data.loader import Batch
from kernels.cross_entropy import IGNORED
from model.language_model import Losses
from model.mixer import Sequence
from parallel.data import reduce_over_copies
from parallel.world import World
from train.config import RunConfig
from train.optimizer import clip_gradients, gradient_norm
from train.schedule import lr_factor
from train.state import TrainState


class StepResult(NamedTuple):
    """What one step did, the same on every rank.

    loss is nats per target, balance the mean balance loss of a row, both over the global batch. load
    [layers E] counts tokens per expert, entropy [layers] is nats per token.
    """

    loss: float
    balance: float
    grad_norm: float
    lr: float
    targets: int
    load: Tensor
    entropy: Tensor
    is_skipped: bool


def train_step(state: TrainState, batch: Batch, config: RunConfig, world: World) -> StepResult:
    """Runs the step on this rank's rows of the global batch. Mutates the state."""
    # Denominators are global and known before backward, so that gradients are plain sums over ranks.
    targets = world.sum((batch.targets != IGNORED).sum().to(world.device))
    batch = to_device(batch, world.device)
    rows = config.train.global_batch
    _, micro = config.rank_rows(world.size)
    total: Losses | None = None
    for start in range(0, batch.tokens.shape[0], micro):
        reduce_over_copies(state.model, is_last=start + micro >= batch.tokens.shape[0])
        losses = micro_losses(state, Batch(*(part[start : start + micro] for part in batch)))
        (losses.cross_entropy / targets.clamp(min=1) + losses.balance / rows).backward()
        losses = Losses(*(part.detach() for part in losses))
        total = losses if total is None else Losses(*(a + b for a, b in zip(total, losses, strict=True)))
    assert total is not None, f"{batch.tokens.shape=}"
    sums = world.sum(torch.cat([part.double().flatten() for part in total]))
    cross_entropy, balance, rest = sums[0] / targets.clamp(min=1), sums[1] / rows, sums[2:]
    load, entropy = rest[: total.load.numel()].view_as(total.load), rest[total.load.numel() :]

    lr = config.optim.lr * lr_factor(config.schedule, state.step, config.train.steps)
    parameters = list(state.model.parameters())
    norm = gradient_norm(parameters)
    # The step waits for the device here: whether to update must be known.
    loss_value, norm_value, count = float(cross_entropy), float(norm), int(targets)
    is_skipped = not (math.isfinite(loss_value) and math.isfinite(norm_value))
    if not is_skipped:
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        clip_gradients(parameters, norm, config.optim.clip_norm)
        state.optimizer.step()
        state.model.update_expert_biases(load)
    state.optimizer.zero_grad()
    state.step += 1
    state.cursor += rows
    state.tokens += count
    state.skipped = state.skipped + 1 if is_skipped else 0
    tokens = rows * batch.tokens.shape[1]
    return StepResult(
        loss_value, float(balance), norm_value, lr, count, load.cpu(), (entropy / tokens).cpu(), is_skipped
    )


def micro_losses(state: TrainState, batch: Batch) -> Losses:
    """The losses of one micro-batch, as sums."""
    return state.model.loss(batch.tokens, batch.targets, Sequence(batch.position, batch.document))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; the copy to a GPU overlaps with what runs there."""
    if device.type == "cpu":
        return batch
    return Batch(*(part.pin_memory().to(device, non_blocking=True) for part in batch))
