"""Linear projection and cross entropy in plain torch: direct, and fused over chunks of tokens.

Letters: N tokens, D width, M vocabulary.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100
CHUNK = 256


class LossOptions(NamedTuple):
    """Cap of the logits, and the factor on the square of their log-sum-exp."""

    cap: float | None = None
    z: float = 0.0


PLAIN = LossOptions()


def linear_cross_entropy_direct(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "M D"],
    targets: Int[Tensor, "N"],
    form: LossOptions = PLAIN,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum of the losses and, without a gradient, the squares in it; with all logits in memory."""
    logits = x @ weight.T
    logits = logits if form.cap is None else form.cap * (logits / form.cap).tanh()
    squares = form.z * logits.logsumexp(1).square().masked_fill(targets == IGNORED, 0.0).sum()
    loss = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return loss + squares, squares.detach()


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy_direct`; gradients are made in forward: only CHUNK rows of logits ever exist."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, form: LossOptions) -> tuple[Tensor, Tensor]:
        """Shapes as `linear_cross_entropy_direct`."""
        accumulate = torch.promote_types(x.dtype, torch.float32)
        cap = form.cap
        total, squares = torch.zeros(2, dtype=accumulate, device=x.device)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros(weight.shape, dtype=accumulate, device=x.device) if needs_weight else None
        for start in range(0, x.shape[0], CHUNK):
            rows, ids = x[start : start + CHUNK], targets[start : start + CHUNK]
            is_counted = (ids != IGNORED)[:, None]
            safe = ids.clamp(min=0)[:, None]
            logits = (rows @ weight.T).to(accumulate)
            slope = None
            if cap is not None:
                tanh = logits.div_(cap).tanh_()
                slope, logits = 1 - tanh.square(), tanh * cap
            picked, highest = logits.gather(1, safe), logits.amax(1, keepdim=True)
            softmax = torch.softmax(logits, 1, out=logits)
            # The log-sum-exp from the largest share, which is at least 1 / M and so has a logarithm.
            lse = highest - softmax.amax(1, keepdim=True).log()
            total += (lse - picked).masked_fill(~is_counted, 0.0).sum()
            if form.z:
                squares += form.z * lse.square().masked_fill(~is_counted, 0.0).sum()
            if not (needs_x or needs_weight):
                continue
            # d loss / d logits = softmax - one-hot; ignored rows are left out where there are fewer numbers.
            if form.z:
                softmax.mul_(1 + 2 * form.z * lse)
            softmax.scatter_add_(1, safe, softmax.new_full(safe.shape, -1.0))
            grad = (softmax if slope is None else softmax.mul_(slope)).to(x.dtype)
            if grad_x is not None:
                torch.mul(grad @ weight, is_counted, out=grad_x[start : start + CHUNK])
            if grad_weight is not None:
                kept = rows * is_counted
                if accumulate == x.dtype:
                    grad_weight.addmm_(grad.T, kept)
                else:
                    grad_weight += (grad.T @ kept).to(accumulate)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(squares)
        return total + squares, squares

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The stored gradients times the gradient of the sum."""
        grad_x, grad_weight = ctx.saved_tensors
        scaled_x = None if grad_x is None else grad_x * grads[0].to(grad_x.dtype)
        scaled_weight = None if grad_weight is None else (grad_weight * grads[0]).to(ctx.weight_dtype)
        return scaled_x, scaled_weight, None, None
