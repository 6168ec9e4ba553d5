"""Rotary positions: pairs of dims turned by angles."""

from jaxtyping import Float
from torch import Tensor

from kernels.arguments import checked, require
from kernels.choose import takes_triton
from kernels.rotary.reference import RotaryLayout, rotate_direct

__all__ = ["RotaryLayout", "rotate"]


@checked
def rotate(
    x: Float[Tensor, "B T H K"],
    cos: Float[Tensor, "#B T R"],
    sin: Float[Tensor, "#B T R"],
    layout: RotaryLayout = "half_split",
    *,
    on_last: bool = False,
) -> Float[Tensor, "B T H K"]:
    """x with its first 2 R dims, or its last, turned by the angles; -sin turns them back.

    half_split: dim m pairs with dim m + R. interleaved: dim 2 m pairs with dim 2 m + 1. Cosines and sines get
    no gradient.

    Raises ValueError for tables of another shape.
    """
    dim = x.shape[-1]
    require(2 * cos.shape[-1] <= dim, "cos", f"at most {dim // 2} angles", cos.shape[-1])
    if takes_triton("rotary", x):
        from kernels.rotary.triton import rotate_triton

        return rotate_triton(x, cos, sin, layout, on_last=on_last)
    return rotate_direct(x, cos, sin, layout, on_last=on_last)
