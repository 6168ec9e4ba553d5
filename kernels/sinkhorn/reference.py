"""Sinkhorn-Knopp normalisation of small square matrices in plain torch.

Letters: N matrices, n streams.
"""

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
