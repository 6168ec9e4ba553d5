"""Optimizers whose update treats each number alone, run on what this rank holds of each parameter."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from train.optim.optimizer import ElementwiseConfig


class Elementwise(Optimizer):
    """Runs `config.update` on local shards, which need nothing of one another. Mutates the parameters."""

    def __init__(self, groups: list[dict[str, Any]], config: ElementwiseConfig) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.config = config

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (no closures here)
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter].update(self.config.initial_state(parameter))
                if self.config.counts_steps:
                    self.state[parameter]["step"] += 1
            slots = [[_local(self.state[x][slot]) for x in parameters] for slot in self.config.slots]
            if parameters:
                values, grads = [_local(x) for x in parameters], [_local(x.grad) for x in parameters]
                self.config.update(values, grads, *slots, lr=group["lr"], weight_decay=group["weight_decay"])


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
