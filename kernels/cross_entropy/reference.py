"""Linear projection and cross entropy in plain torch: direct, and fused over chunks of tokens.

Letters: N tokens, D width, M vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100
CHUNK = 512


def linear_cross_entropy_direct(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "M D"], targets: Int[Tensor, "N"]
) -> Float[Tensor, ""]:
    """Sum of the losses, with all logits in memory."""
    return cross_entropy((x @ weight.T), targets, ignore_index=IGNORED, reduction="sum")


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses; gradients are made in forward, so that only CHUNK rows of logits ever exist."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Shapes as `linear_cross_entropy_direct`."""
        accumulate = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulate, device=x.device)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros(weight.shape, dtype=accumulate, device=x.device) if needs_weight else None
        for start in range(0, x.shape[0], CHUNK):
            rows, ids = x[start : start + CHUNK], targets[start : start + CHUNK]
            is_counted = ids != IGNORED
            safe = ids.clamp(min=0)[:, None]
            logits = (rows @ weight.T).to(accumulate)
            picked = logits.gather(1, safe)[:, 0]
            highest = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(highest).exp_()
            denominator = exponentials.sum(1, keepdim=True)
            total += ((denominator.log() + highest)[:, 0] - picked).masked_fill(~is_counted, 0.0).sum()
            if not (needs_x or needs_weight):
                continue
            # d loss / d logits = softmax - one-hot, zero for ignored rows.
            grad = exponentials.mul_(is_counted[:, None] / denominator)
            grad.scatter_add_(1, safe, -is_counted[:, None].to(accumulate))
            grad = grad.to(x.dtype)
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[start : start + CHUNK])
            if grad_weight is not None:
                grad_weight += (grad.T @ rows).to(accumulate)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The stored gradients times the gradient of the sum."""
        grad_x, grad_weight = ctx.saved_tensors
        scaled_x = None if grad_x is None else grad_x * grads[0].to(grad_x.dtype)
        scaled_weight = None if grad_weight is None else (grad_weight * grads[0]).to(ctx.weight_dtype)
        return scaled_x, scaled_weight, None
