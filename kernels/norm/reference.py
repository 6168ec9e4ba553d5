"""Root-mean-square norm in plain torch: direct, and the form that keeps only x and its scale.

Letters: N rows, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm_direct(
    x: Float[Tensor, "*N D"], weight: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "*N D"]:
    """x over the root of its mean square, times weight."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


class RmsNorm(torch.autograd.Function):
    """The same in float32 at least; backward works from x and one number per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Shapes as `rms_norm_direct`; the result has the dtype of x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        dtype = scale.dtype
        wide, grad = x.to(dtype), grads[0].to(dtype)
        # y = x s w with s = (mean x^2 + eps)^(-1/2): dx = s (g w) - x s^3 mean(g w x)
        along = grad * wide
        grad_weight = along.flatten(0, -2).T @ scale.flatten()
        pull = (along @ weight.to(dtype))[..., None] * scale.pow(3).div_(-x.shape[-1])
        grad_x = (grad * weight.to(dtype)).mul_(scale).addcmul_(wide, pull.expand_as(wide))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
