"""All that a run is between two steps, as a checkpoint keeps it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from parallel.apply import Parallel
from parallel.mesh.world import World
from train.optim.optimizer import OptimizerConfig
from train.optim.param_groups import clip_gradients, gradient_norm


@dataclass
class TrainState:
    """Model, optimizer and counters. Mutated by every step.

    step counts optimizer steps, cursor sequences of the global data order, tokens predicted targets,
    skipped steps in a row without update.
    """

    built: Parallel
    optimizer: Optimizer
    optim: OptimizerConfig
    step: int = 0
    cursor: int = 0
    tokens: int = 0
    skipped: int = 0

    def tensors(self, world: World) -> dict[str, Any]:
        """Weights, expert biases, optimizer state and this rank's random state, for sharded storage.

        Mutates the optimizer: moments that it has not made yet are made, as zeros.
        """
        random = {"cpu": torch.get_rng_state()}
        if world.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": self.built.checkpoint_state(),
            "optimizer": {"state": self.moments()},
            "random": {f"rank_{world.rank}_of_{world.size}": random},
        }

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """The optimizer's state by name of parameter, as checkpoints take it; made where it is missing."""
        trained = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        found = {}
        for name, parameter in self.built.named_parameters():
            if parameter in trained:
                state = self.optimizer.state[parameter]
                if not state:
                    state.update(self.optim.initial_state(parameter))
                if name in found:
                    continue  # both ends of a pipeline are here: the first one's table is kept
                found[name] = {
                    key: self.built.checkpoint_view(name, value) if key in self.optim.slots else value
                    for key, value in state.items()
                }
        return found

    def update(self, loss: float, lr: float, limit: float, world: World) -> tuple[float, bool]:
        """Clips gradients at `limit` and steps, unless loss or norm is not finite.

        Gives the norm before, and whether the step was taken. Gradients are gone. Mutates the weights.
        """
        norm = self.reduce_gradients(world)
        # The step waits for the device here: whether to update must be known.
        norm_value = float(norm)
        is_taken = math.isfinite(loss) and math.isfinite(norm_value)
        if is_taken:
            self.apply(norm, lr, limit)
        self.optimizer.zero_grad()
        return norm_value, is_taken

    def reduce_gradients(self, world: World) -> torch.Tensor:
        """The global norm of the gradients, in float64, once ranks that share parameters have their sum."""
        self.built.sum_shared_gradients(world.axes)
        return gradient_norm(self.built, world)

    def apply(self, norm: torch.Tensor, lr: float, limit: float) -> None:
        """Clips gradients of norm `norm` at `limit` and steps. Mutates gradients and weights."""
        self.set_lr(lr)
        clip_gradients(self.built, norm, limit)
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        """Gives every group of the optimizer its learning rate. Mutates the groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def counters(self) -> dict[str, int]:
        """What is not a tensor, for the manifest."""
        return {"step": self.step, "cursor": self.cursor, "tokens": self.tokens, "skipped": self.skipped}

    def restore(self, tensors: dict[str, Any], counters: dict[str, int], world: World) -> None:
        """Takes over what was loaded into the result of `tensors`; weights and moments were, in place."""
        for first, last in self.built.tied_copies():
            last.detach().copy_(first.detach())
            for key, moment in self.optimizer.state[first].items():
                self.optimizer.state[last][key].copy_(moment)
        random = tensors["random"][f"rank_{world.rank}_of_{world.size}"]
        torch.set_rng_state(random["cpu"])
        if world.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"])
        self.step, self.cursor = counters["step"], counters["cursor"]
        self.tokens, self.skipped = counters["tokens"], counters["skipped"]
