"""Steps of the training loop on rows that a model can learn and that need no data."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from data.loader import Batch
from kernels.cross_entropy import IGNORED
from parallel.mesh.world import World
from train.config.run_config import RunConfig
from train.loop.kernel_check import prepare_kernels
from train.loop.run import build_state
from train.loop.step import train_step


class Reading(NamedTuple):
    """Of one step: its loss in nats per target, the norm of its gradients, and its seconds."""

    loss: float
    grad_norm: float
    seconds: float


def batch_of(config: RunConfig, step: int) -> Batch:
    """Rows whose tokens go up by a number of their own, around the vocabulary; equal on every machine."""
    rows, tokens, size = config.train.global_batch, config.data.sequence_length, config.model.vocab_size
    rng = torch.Generator().manual_seed(step)
    first = torch.randint(size, (rows, 1), generator=rng)
    stride = torch.randint(1, 8, (rows, 1), generator=rng)
    ids = (first + stride * torch.arange(tokens)) % size
    targets = torch.cat([ids[:, 1:], torch.full((rows, 1), IGNORED)], dim=1)
    position = torch.arange(tokens).expand(rows, -1).contiguous()
    return Batch(ids, targets, torch.zeros_like(ids), position, torch.arange(rows))


def train_on_rows(config: RunConfig, world: World, steps: int) -> Iterator[Reading]:
    """Readings of the first steps of a run in this process, weights drawn from `train.seed`."""
    state = build_state(config, world)
    print(prepare_kernels(config, state.built.modules(), world), flush=True)
    for step in range(steps):
        batch = batch_of(config, step)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        # The loss is read within: the device has done all of the step when this returns.
        result = train_step(state, batch, config, world)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        yield Reading(result.loss, result.grad_norm, time.perf_counter() - start)
