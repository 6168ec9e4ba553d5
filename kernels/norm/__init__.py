"""Root-mean-square norms along the last dim: plain, zero-centred, gated, and to unit length."""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.arguments import checked, require
from kernels.choose import takes_triton
from kernels.norm.reference import Gate, RmsNorm, gated_rms_norm_direct, unit_norm_direct

__all__ = ["Gate", "gated_rms_norm", "rms_norm", "unit_norm"]


@checked
def rms_norm(
    x: Float[Tensor, "*N D"], weight: Float[Tensor, "D"], eps: float, *, is_zero_centered: bool = False
) -> Float[Tensor, "*N D"]:
    """x over the root of its mean square, times weight, or 1 + weight; in float32 at least.

    The result has the dtype of x.

    Raises ValueError for a weight of another width.
    """
    if takes_triton("norm", x):
        from kernels.norm.triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, is_zero_centered=is_zero_centered)
    out = RmsNorm.apply(x, weight + 1.0 if is_zero_centered else weight, eps)
    assert isinstance(out, Tensor), f"{type(out)=}"
    return out


@checked
def gated_rms_norm(
    x: Float[Tensor, "*N D"],
    gate: Float[Tensor, "*N D"],
    weight: Float[Tensor, "#R D"],
    eps: float,
    *,
    kind: Gate,
    gates_first: bool = False,
) -> Float[Tensor, "*N D"]:
    """The norm of x times weight, times the activated gate; or the norm of x times the activated gate.

    gates_first says the latter. weight is one for all rows, or one for each of the R of the dim before the
    last. In float32 at least; the result has the dtype of the gate.

    Raises ValueError for a gate or weight of another shape.
    """
    inner = x.shape[-2] if x.ndim > 1 else 1
    require(weight.shape in ((1, x.shape[-1]), (inner, x.shape[-1])), "weight", x.shape[-2:], weight.shape)
    if takes_triton("norm", gate):
        from kernels.norm.triton import gated_rms_norm_triton

        return gated_rms_norm_triton(x, gate, weight, eps, kind=kind, gates_first=gates_first)
    dtype = torch.promote_types(gate.dtype, torch.float32)
    x, weight, wide = x.to(dtype), weight.to(dtype), gate.to(dtype)
    return gated_rms_norm_direct(x, wide, weight, eps, kind=kind, gates_first=gates_first).to(gate.dtype)


@checked
def unit_norm(x: Float[Tensor, "*N D"], *, factor: float = 1.0, eps: float = 1e-6) -> Float[Tensor, "*N D"]:
    """x over its length, times factor, in float32 at least; a zero vector stays zero. Has the dtype of x."""
    if takes_triton("norm", x):
        from kernels.norm.triton import unit_norm_triton

        return unit_norm_triton(x, factor=factor, eps=eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return unit_norm_direct(wide, factor=factor, eps=eps).to(x.dtype)
