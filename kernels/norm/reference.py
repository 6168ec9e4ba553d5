"""Root-mean-square norms in plain torch: direct, and the form that keeps only x and its scale.

Letters: N rows, D width.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

Gate = Literal["silu", "sigmoid"]


def rms_norm_direct(
    x: Float[Tensor, "*N D"],
    weight: Float[Tensor, "D"] | None,
    eps: float,
    *,
    is_zero_centered: bool = False,
    factor: float = 1.0,
) -> Float[Tensor, "*N D"]:
    """x over the root of its mean square, times weight, or 1 + weight, times factor."""
    out = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * factor
    return out if weight is None else out * (weight + 1 if is_zero_centered else weight)


def gated_rms_norm_direct(
    x: Float[Tensor, "*N D"],
    gate: Float[Tensor, "*N D"],
    weight: Float[Tensor, "#R D"],
    eps: float,
    *,
    kind: Gate,
    gates_first: bool,
) -> Float[Tensor, "*N D"]:
    """The norm times the activated gate, or the norm of that product; weights by row or for all rows."""
    active = silu(gate) if kind == "silu" else gate.sigmoid()
    if gates_first:
        return rms_norm_direct(x * active, None, eps) * weight
    return rms_norm_direct(x, None, eps) * weight * active


class RmsNorm(torch.autograd.Function):
    """The plain norm in float32 at least; backward works from x and one number per row."""

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


def unit_norm_direct(x: Float[Tensor, "*N D"], *, factor: float, eps: float) -> Float[Tensor, "*N D"]:
    """x over its length, times factor."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt() * factor
