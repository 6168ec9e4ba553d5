"""Routed experts: every token through its chosen experts, none dropped."""

from jaxtyping import Float, Int
from torch import Tensor

from kernels.activation import is_gated
from kernels.arguments import checked, require, require_within
from kernels.choose import takes_triton
from kernels.experts.reference import PLAIN, ExpertBiases, ExpertForm, experts_grouped

__all__ = ["PLAIN", "ExpertBiases", "ExpertForm", "routed_experts"]


@checked
def routed_experts(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E H D"],
    down: Float[Tensor, "E D F"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
    form: ExpertForm = PLAIN,
    biases: ExpertBiases | None = None,
    *,
    num_idle: int = 0,
) -> Float[Tensor, "N D"]:
    """Sum over each token's chosen experts of weight * down(act(gate_up x)).

    The rows of gate_up are the F gate rows, then the F up rows; without a gate only F rows. Experts may be
    chosen by no token or by all; their gradient is then zero or full. Ids from E to
    E + num_idle add nothing.

    Raises ValueError for an argument of the wrong shape, dtype, device or range.
    """
    experts, columns, width = gate_up.shape
    hidden = columns // 2 if is_gated(form.kind) else columns
    require(columns % 2 == 0 or not is_gated(form.kind), "gate_up", "an even number of rows", columns)
    require(down.shape == (experts, width, hidden), "down", (experts, width, hidden), tuple(down.shape))
    require(chosen.shape[1] > 0, "chosen", "at least one expert per token", tuple(chosen.shape))
    require_within("chosen", chosen, 0, experts + num_idle)
    found = (gate_up.dtype, down.dtype)
    require(found == (x.dtype, x.dtype), "gate_up, down", f"dtype {x.dtype}, as x", found)
    if biases is not None:
        found = (biases.up.dtype, biases.down.dtype)
        require(found == (x.dtype, x.dtype), "biases", f"dtype {x.dtype}, as x", found)
        found = (biases.up.device, biases.down.device)
        require(found == (x.device, x.device), "biases", f"on {x.device}, as x", found)
    require(form.limit is None or form.limit > 0, "form.limit", "None or above 0", form.limit)
    if biases is not None:
        shapes = ((experts, columns), (experts, width))
        found = (tuple(biases.up.shape), tuple(biases.down.shape))
        require(found == shapes, "biases", shapes, found)
    if takes_triton("experts", x):
        from kernels.experts.triton import routed_experts_triton

        return routed_experts_triton(x, gate_up, down, chosen, weights, form, biases)
    # torch's grouped product reads whole 16 bytes.
    unit = 16 // x.element_size()
    for dim in (width, columns, hidden):
        require(dim % unit == 0, "gate_up", f"dims of multiples of {unit} in {x.dtype}", tuple(gate_up.shape))
    return experts_grouped(x, gate_up, down, chosen, weights.to(x.dtype), form, biases, num_idle=num_idle)
