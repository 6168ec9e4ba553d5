"""Learning rate as a pure function of the step."""

import math

from train.config.fields import CosineConfig, WsdConfig


def lr_factor(schedule: WsdConfig | CosineConfig, step: int, steps: int) -> float:
    """Share of the peak for the update that makes step `step` into `step + 1` of `steps`, in [0, 1]."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if isinstance(schedule, WsdConfig):
        start = max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))
        if step < start:
            return 1.0
        return schedule.floor + (1 - schedule.floor) * (1 - math.sqrt((step - start) / (steps - start)))
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * progress))
