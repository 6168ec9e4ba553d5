"""Matrices pulled towards doubly stochastic ones, for manifold-constrained hyper-connections."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from kernels.arguments import checked, require
from kernels.choose import takes_triton
from kernels.sinkhorn.reference import sinkhorn_planar


class Case(NamedTuple):
    """One shape that tests and benchmarks share."""

    matrices: int
    streams: int
    iterations: int


CASES = (Case(1, 1, 1), Case(3, 2, 4), Case(17, 4, 20), Case(5, 3, 7))


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
