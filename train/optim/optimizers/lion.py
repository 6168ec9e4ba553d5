"""Lion: the sign of an interpolated momentum, arXiv 2302.06675 algorithm 2."""

# torch keeps operations on lists of tensors under private names; its own optimizers are made of them.
# pyright: reportPrivateImportUsage=false

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from train.optim.optimizer import ElementwiseConfig

if TYPE_CHECKING:
    from torch import Tensor


class LionConfig(ElementwiseConfig):
    """Lion."""

    kind: Literal["lion"] = "lion"
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)

    slots = ("exp_avg",)

    def update(
        self,
        parameters: "list[Tensor]",
        grads: "list[Tensor]",
        *slots: "list[Tensor]",
        lr: float,
        weight_decay: float,
    ) -> None:
        """x (1 - lr decay) - lr sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g."""
        import torch

        (momentum,) = slots
        direction = torch._foreach_lerp(grads, momentum, self.beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, direction, alpha=-lr)
        torch._foreach_lerp_(momentum, grads, 1 - self.beta2)
