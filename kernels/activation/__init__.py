"""Activations of feed-forwards: gated by SiLU or GELU, clamped, shifted, or a squared ReLU without gate."""

from jaxtyping import Float
from torch import Tensor

from kernels.activation.reference import Kind, activate_direct, is_gated
from kernels.arguments import checked, require
from kernels.choose import takes_triton

__all__ = ["Kind", "activate", "is_gated"]


@checked
def activate(
    hidden: Float[Tensor, "*N F2"], kind: Kind, *, limit: float | None = None, clamps_product: bool = False
) -> Float[Tensor, "*N F"]:
    """act(gate) * up of the gate columns and the up columns behind them; relu(hidden)^2 for `relu2`.

    swiglu and geglu (tanh form) take SiLU and GELU of the gate; shifted_swiglu is gate sigmoid(1.702 gate)
    (up + 1). `limit` caps gates from above and ups on both sides, before the activation (DeepSeek-V4,
    gpt-oss), or with `clamps_product` the two factors after it (Step-3.5). relu2 takes no limit.

    Raises ValueError for an odd number of columns or a limit out of range.
    """
    if is_gated(kind):
        require(hidden.shape[-1] % 2 == 0, "hidden", "an even number of columns", hidden.shape[-1])
    require(
        limit is None or (limit > 0 and is_gated(kind)), "limit", "None, or above 0 and a gated form", limit
    )
    if takes_triton("activation", hidden):
        from kernels.activation.triton import activate_triton

        return activate_triton(hidden, kind, limit=limit, clamps_product=clamps_product)
    return activate_direct(hidden, kind, limit=limit, clamps_product=clamps_product)
