"""Half a cosine from the peak to the floor (arXiv 1608.03983 equation 5, without restarts)."""

import math
from typing import Literal

from pydantic import Field

from train.optim.schedule import ScheduleConfig


class CosineConfig(ScheduleConfig):
    """Warm-up, then half a cosine."""

    kind: Literal["cosine"] = "cosine"
    floor: float = Field(ge=0, le=1)

    def after_warmup(self, step: int, steps: int) -> float:
        """Half a cosine over what is left after warm-up."""
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
