"""Matrices pulled towards doubly stochastic ones, for manifold-constrained hyper-connections."""

from jaxtyping import Float
from torch import Tensor

from kernels.arguments import checked, require
from kernels.choose import takes_triton
from kernels.sinkhorn.reference import sinkhorn_planar


@checked
def sinkhorn(logits: Float[Tensor, "*N n n"], *, iterations: int, eps: float) -> Float[Tensor, "*N n n"]:
    """Matrices whose columns sum to 1 and whose rows nearly do, at least zero everywhere.

    Rows start as softmax(logits) + eps; every division is by the sum + eps. Mind that the last
    normalisation is that of the columns.

    Raises ValueError for fewer than one iteration.
    Manifold-constrained hyper-connections, as DeepSeek-V4 computes them.
    """
    require(iterations >= 1, "iterations", "at least 1", iterations)
    if takes_triton("sinkhorn", logits):
        from kernels.sinkhorn.triton import sinkhorn_triton

        return sinkhorn_triton(logits, iterations=iterations, eps=eps)
    return sinkhorn_planar(logits, iterations=iterations, eps=eps)
