"""AdamW, arXiv 1711.05101 algorithm 2, by torch's fused implementation."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from train.optim.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from torch.optim import AdamW


class AdamwConfig(OptimizerConfig):
    """AdamW."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(gt=0)

    slots = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def build(self, groups: list[dict[str, Any]]) -> "AdamW":
        """torch.optim.AdamW."""
        from torch.optim import AdamW

        return AdamW(groups, self.lr, (self.beta1, self.beta2), self.eps, fused=True)
