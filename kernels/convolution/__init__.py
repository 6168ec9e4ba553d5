"""Short causal depthwise convolution, usually with SiLU, which stops at document starts."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.convolution.reference import ShortConvolution


class Case(NamedTuple):
    """One shape that tests and benchmarks share."""

    rows: int
    tokens: int
    channels: int
    taps: int


CASES = (Case(1, 1, 3, 4), Case(2, 3, 5, 4), Case(2, 17, 8, 4), Case(1, 9, 4, 1))


def short_convolution(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, "D"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
    has_silu: bool = True,
) -> Float[Tensor, "B T D"]:
    """SiLU of a causal depthwise convolution plus bias; taps that reach into another document count as zero.

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    require(x.shape[1] > 0, "x", "at least one token", tuple(x.shape))
    require(weight.shape[0] == x.shape[2], "weight", f"{x.shape[2]} channels", tuple(weight.shape))
    require(weight.dtype == x.dtype, "weight", f"dtype {x.dtype}, as x", weight.dtype)
    if bias is not None:
        require(bias.shape == x.shape[2:], "bias", tuple(x.shape[2:]), tuple(bias.shape))
        require(bias.dtype == x.dtype, "bias", f"dtype {x.dtype}, as x", bias.dtype)
    if document is not None:
        require(document.shape == x.shape[:2], "document", tuple(x.shape[:2]), tuple(document.shape))
    out = ShortConvolution.apply(x, weight, bias, document, has_silu)
    assert isinstance(out, Tensor), f"{type(out)=}"
    return out
