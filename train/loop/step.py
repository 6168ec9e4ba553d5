"""One optimizer step: forward and backward over micro-batches, global sums, clip, update."""

from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from data.loader import Batch
from model.language_model import Losses
from parallel.context.sharding import cut_rows
from parallel.mesh.world import World
from parallel.micro_batches import Denominators, MicroBatch, count_targets
from train.config.run_config import RunConfig
from train.loop.state import TrainState


class StepResult(NamedTuple):
    """What one step did, the same on every rank.

    loss is nats per target, mtp that of each MTP module over its own targets, auxiliary the other losses by
    name, per token, coefficients included, all over the global batch. load [layers E] counts tokens per
    expert, entropy [layers] is nats per token.
    """

    loss: float
    mtp: list[float]
    auxiliary: dict[str, float]
    grad_norm: float
    lr: float
    targets: int
    load: Tensor
    entropy: Tensor
    is_skipped: bool


def train_step(state: TrainState, batch: Batch, config: RunConfig, world: World) -> StepResult:
    """Runs the step on this rank's rows of the global batch. Mutates the state."""
    batches, denominators = split_batch(batch, config, world, state.step)
    losses = state.built.runner.step(batches, denominators)
    total = summed_over_ranks(losses, world)
    targets, tokens = denominators.targets.clamp(min=1), denominators.tokens
    loss, count = float(total.cross_entropy / targets[0]), int(denominators.targets[0])

    lr = config.optim.lr * config.schedule.factor(state.step, config.train.steps)
    norm, is_taken = state.update(loss, lr, config.optim.clip_norm, world)
    if is_taken:
        state.built.update_expert_biases(total.load)
    state.step += 1
    state.cursor += config.train.global_batch
    state.tokens += count
    state.skipped = 0 if is_taken else state.skipped + 1
    auxiliary = {name: float(part) / tokens for name, part in total.auxiliary.items()}
    if config.model.z_loss:
        auxiliary["logit_z"] = float(total.logit_z[0] / targets[0])
    return StepResult(
        loss=loss,
        mtp=(total.mtp / targets[1:]).tolist(),
        auxiliary=auxiliary,
        grad_norm=norm,
        lr=lr,
        targets=count,
        load=total.load.cpu(),
        entropy=(total.entropy / tokens).cpu(),
        is_skipped=not is_taken,
    )


def split_batch(
    batch: Batch, config: RunConfig, world: World, step: int
) -> tuple[list[MicroBatch], Denominators]:
    """This rank's micro-batches of its rows, and what the losses of the global batch are divided by."""
    # Denominators are global and known before backward, so that gradients are plain sums over ranks.
    axes = world.axes
    copies = axes.pp.size * axes.sequence.size
    mtp = config.model.mtp
    targets = world.sum(count_targets(batch, mtp.depth).to(world.device)) // copies
    batch = to_device(batch, world.device)
    _, micro = config.rank_rows(axes.batch.size)
    options = {"uniform": step_uniform(config.train.seed, step), "mtp_depth": mtp.depth}
    batches = [
        cut_rows(Batch(*(part[start : start + micro] for part in batch)), axes.cp, **options)
        for start in range(0, batch.tokens.shape[0], micro)
    ]
    tokens = config.train.global_batch * batch.tokens.shape[1]
    return batches, Denominators(targets, tokens, mtp.coefficient)


def summed_over_ranks(losses: Losses, world: World) -> Losses:
    """The sums over all ranks, by one collective, in float64."""
    parts = losses.parts()
    sums = world.sum(torch.cat([part.double().flatten() for part in parts]))
    pieces = sums.split([part.numel() for part in parts])
    return losses.with_parts([piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)])


def step_uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that all layers, ranks and micro-batches of a step share."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{step}".encode()) / 2**64


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; the copy to a GPU overlaps with what runs there."""
    if device.type == "cpu":
        return batch
    return Batch(*(part.pin_memory().to(device, non_blocking=True) for part in batch))
