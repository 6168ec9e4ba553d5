"""Root-mean-square norm along the last dim."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from kernels.arguments import require
from kernels.choose import takes_triton
from kernels.norm.reference import RmsNorm


class Case(NamedTuple):
    """One shape that tests and benchmarks share."""

    rows: int
    width: int


CASES = (Case(1, 2), Case(3, 5), Case(17, 64), Case(2, 1000))


def rms_norm(x: Float[Tensor, "*N D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*N D"]:
    """x over the root of its mean square, times weight; statistics and product in float32 at least.

    The result has the dtype of x.

    Raises ValueError for a weight of another width.
    """
    require(weight.shape == x.shape[-1:], "weight", tuple(x.shape[-1:]), tuple(weight.shape))
    if takes_triton("norm", x):
        from kernels.norm.triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    out = RmsNorm.apply(x, weight, eps)
    assert isinstance(out, Tensor), f"{type(out)=}"
    return out
