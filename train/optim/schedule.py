"""The contract of a learning-rate schedule: a pure function of the step; without torch.

A schedule is one file of train/optim/schedules/ and one of conf/schedule/.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

from pydantic import Field

import train.optim.schedules
from conf.compose import Config
from conf.kinds import kinds_in, one_of


class ScheduleConfig(Config, ABC):
    """Linear warm-up, then what a subclass says. A subclass has a literal `kind` with its own default."""

    warmup_steps: int = Field(ge=0)

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak for the update that makes step `step` into `step + 1` of `steps`, in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step, steps)

    def cautions(self, steps: int) -> list[str]:
        """What of the schedule does not happen as its keys say in a run of `steps` steps, one line each."""
        if self.warmup_steps < steps:
            return []
        peak = steps / self.warmup_steps
        reached = f"the rate ends at {peak:.0%} of optim.lr" if peak < 1 else "the rate never falls"
        return [
            f"schedule.warmup_steps={self.warmup_steps} leaves nothing of train.steps={steps}: {reached}; "
            f"lower schedule.warmup_steps or raise train.steps"
        ]

    @abstractmethod
    def after_warmup(self, step: int, steps: int) -> float:
        """The same for a step at or after `warmup_steps`."""


@cache
def schedule_kinds() -> dict[str, type[ScheduleConfig]]:
    """Every schedule config by its kind: the files of train/optim/schedules/."""
    return kinds_in(train.optim.schedules, ScheduleConfig)


def schedule_type() -> Any:
    """The pydantic type of the `schedule` node."""
    return one_of(schedule_kinds())
