"""The state of a run that DeepSpeed trains."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from parallel.apply import Parallel, StepShape
from parallel.deepspeed import Partitioned, partition
from parallel.mesh.world import World
from train.config.run_config import RunConfig
from train.loop.state import TrainState
from train.optim.param_groups import build_optimizer


@dataclass
class ZeroState(TrainState):
    """Model, optimizer and counters, weights and moments cut by DeepSpeed. Mutated by every step.

    zero is `built`.
    """

    zero: Partitioned = field(kw_only=True)

    def update(self, loss: float, lr: float, limit: float, world: World) -> tuple[float, bool]:
        """Steps, unless loss or norm is not finite; the limit is that of the engine.

        Gives the norm before clipping, and whether the step was taken.
        """
        self.set_lr(lr)
        return self.zero.engine.update()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state by name of parameter, as checkpoints take it."""
        return self.zero.checkpoint_moments()

    def restore(self, tensors: dict[str, Any], counters: dict[str, int], world: World) -> None:
        """Takes over what was loaded into the result of `tensors`. Collective."""
        super().restore(tensors, counters, world)
        self.zero.engine.partition_map.sync_params()


def build_zero_state(built: Parallel, config: RunConfig, step_shape: StepShape, world: World) -> ZeroState:
    """The state before the first step."""
    optimizer = build_optimizer(built, config.optim)
    zero = partition(
        built,
        optimizer,
        world,
        config.parallel.zero,
        clip_norm=config.optim.clip_norm,
        step_shape=(step_shape.micro_batches, step_shape.rows),
        initial_state=config.optim.initial_state,
    )
    return ZeroState(zero, optimizer, config.optim, zero=zero)
