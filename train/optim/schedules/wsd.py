"""Warm-up, stable, decay: flat, then 1 - sqrt to the floor (arXiv 2404.06395, 2405.18392)."""

import math
from typing import Literal

from pydantic import Field

from train.optim.schedule import ScheduleConfig


class WsdConfig(ScheduleConfig):
    """Warm-up, stable, decay."""

    kind: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(gt=0, le=1)
    floor: float = Field(ge=0, le=1)

    def cautions(self, steps: int) -> list[str]:
        """Also where warm-up shortens the decay."""
        start = steps - round(self.decay_fraction * steps)
        if start >= self.warmup_steps or self.warmup_steps >= steps:
            return super().cautions(steps)
        return [
            f"schedule.decay_fraction={self.decay_fraction:g} of train.steps={steps} begins within "
            f"schedule.warmup_steps={self.warmup_steps}: the decay takes {steps - self.warmup_steps} steps; "
            f"lower one of them"
        ]

    def after_warmup(self, step: int, steps: int) -> float:
        """1 until the last `decay_fraction` of all steps."""
        start = max(self.warmup_steps, steps - round(self.decay_fraction * steps))
        if step < start:
            return 1.0
        return self.floor + (1 - self.floor) * (1 - math.sqrt((step - start) / (steps - start)))
