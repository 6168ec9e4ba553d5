"""Sinkhorn-Knopp normalisation of small square matrices in plain torch: as defined, and many at a time.

Letters: N matrices, n streams.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor


def sinkhorn_iterated(
    logits: Float[Tensor, "*N n n"], *, iterations: int, eps: float
) -> Float[Tensor, "*N n n"]:
    """Softmax over rows plus eps, columns normalised, then rows and columns in turn."""
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def sinkhorn_planar(
    logits: Float[Tensor, "*N n n"], *, iterations: int, eps: float
) -> Float[Tensor, "*N n n"]:
    """The same with all matrices side by side, so that every sum and division runs over long vectors."""
    n = logits.shape[-1]
    planes = logits.reshape(-1, n, n).permute(1, 2, 0).contiguous()
    result = cast(Tensor, PlanarSinkhorn.apply(planes, iterations, eps))
    return result.permute(2, 0, 1).reshape(logits.shape)


class PlanarSinkhorn(torch.autograd.Function):
    """logits [n n N], rows first -> matrices [n n N]. The iterations are made again for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        """Softmax over each row, then columns and rows in turn."""
        ctx.save_for_backward(logits)
        ctx.iterations, ctx.eps = iterations, eps
        matrix = logits.softmax(1).add_(eps)
        for dim in _dims(iterations):
            matrix.div_(matrix.sum(dim, keepdim=True).add_(eps))
        return matrix

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Through each division: of y = x / s the gradient is (g - sum(g y)) / s."""
        (logits,) = ctx.saved_tensors
        dims, eps = _dims(ctx.iterations), ctx.eps
        first = logits.softmax(1)
        matrix, steps = first + eps, []
        for dim in dims:
            total = matrix.sum(dim, keepdim=True).add_(eps)
            matrix = matrix / total
            steps.append((dim, matrix, total))
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        for dim, matrix, total in reversed(steps):
            grad.sub_((grad * matrix).sum(dim, keepdim=True)).div_(total)
        grad.sub_((grad * first).sum(1, keepdim=True)).mul_(first)
        return grad, None, None


def _dims(iterations: int) -> list[int]:
    # 0 sums a column, 1 a row.
    return [0, *[1, 0] * (iterations - 1)]
