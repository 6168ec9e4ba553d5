"""The contract of an optimizer: its keys, the state that it keeps of a parameter, its update; without torch.

An optimizer is one file of train/optim/optimizers/, which imports torch inside its methods only, so that a
mistyped key comes back at once, and one file of conf/optim/.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

import train.optim.optimizers
from conf.compose import Config
from conf.kinds import kinds_in, one_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class OptimizerConfig(Config, ABC):
    """Keys that every optimizer has. A subclass has a literal `kind` with its own default, and its own keys.

    What checkpoints, the memory plan, the rehearsal and ZeRO need to know follows from `slots`.
    """

    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip_norm: float = Field(gt=0)
    lr_scales: dict[str, Annotated[float, Field(ge=0)]]

    # Entries of the optimizer's state that have the shape and dtype of their parameter.
    slots: ClassVar[tuple[str, ...]] = ()
    # Whether the state has `step` as well, a float32 count of updates.
    counts_steps: ClassVar[bool] = False

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        """The torch optimizer of parameter groups, each with `params`, `weight_decay` and `lr_scale`."""

    def initial_state(self, parameter: "Tensor") -> dict[str, "Tensor"]:
        """The state of a parameter before its first update: all zeros."""
        import torch

        state = {}
        if self.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state | {slot: torch.zeros_like(parameter.detach()) for slot in self.slots}


class ElementwiseConfig(OptimizerConfig, ABC):
    """An optimizer whose update of a number needs no other number of the parameter."""

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        """`update` as a torch optimizer, on local shards."""
        from train.optim.elementwise import Elementwise

        return Elementwise(groups, self)

    @abstractmethod
    def update(
        self,
        parameters: "list[Tensor]",
        grads: "list[Tensor]",
        *slots: "list[Tensor]",
        lr: float,
        weight_decay: float,
    ) -> None:
        """Updates parameters and slots in place; each list has an entry for each parameter."""


@cache
def optimizer_kinds() -> dict[str, type[OptimizerConfig]]:
    """Every optimizer config by its kind: the files of train/optim/optimizers/."""
    return kinds_in(train.optim.optimizers, OptimizerConfig)


def optimizer_type() -> Any:
    """The pydantic type of the `optim` node."""
    return one_of(optimizer_kinds())
