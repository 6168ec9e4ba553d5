"""Routed SwiGLU experts: every token through its chosen experts, none dropped."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.experts.reference import experts_grouped


class Case(NamedTuple):
    """One shape that tests and benchmarks share."""

    tokens: int
    width: int
    experts: int
    top_k: int
    hidden: int


CASES = (Case(1, 16, 4, 1, 16), Case(33, 16, 8, 3, 16), Case(64, 32, 4, 4, 16), Case(7, 16, 32, 2, 32))


def routed_experts(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
) -> Float[Tensor, "N D"]:
    """Sum over each token's chosen experts of weight * down(silu(gate x) * up x).

    The rows of gate_up are the F gate rows, then the F up rows. Experts may be chosen by no token or by
    all; their gradient is then zero or full. Ids in `chosen` are trusted to be below E.

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    experts, hidden2, width = gate_up.shape
    require(x.shape[1] == width, "x", f"width {width}", tuple(x.shape))
    require(hidden2 % 2 == 0, "gate_up", "an even number of rows per expert", hidden2)
    require(down.shape == (experts, width, hidden2 // 2), "down", (experts, width, hidden2 // 2), down.shape)
    require(chosen.shape[0] == x.shape[0], "chosen", f"{x.shape[0]} tokens", tuple(chosen.shape))
    require(weights.shape == chosen.shape, "weights", tuple(chosen.shape), tuple(weights.shape))
    require(gate_up.dtype == down.dtype == x.dtype, "gate_up, down", f"dtype {x.dtype}", gate_up.dtype)
    return experts_grouped(x, gate_up, down, chosen, weights.to(x.dtype))
