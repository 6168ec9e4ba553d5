"""Activations of experts and their derivatives as device functions, for the epilogues of matrix products.

All take and give float32. A limit enters as two numbers: gates stop at `gate_limit`, ups at `up_limit` on
both sides. That also serves forms that cap the factors after the activation: for positive gates it grows, so
a cap on its result is a cap on the gate.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# A kernel's launch looks to pyright like a call of the Python function.

import math
from functools import lru_cache

import triton
import triton.language as tl

from kernels.activation.reference import SHIFTED_SLOPE, Kind

SLOPE = tl.constexpr(SHIFTED_SLOPE)
ROOT = tl.constexpr(math.sqrt(2 / math.pi))
CUBE = tl.constexpr(0.044715)


@triton.jit
def sigmoid_of(x):
    """1 / (1 + exp(-x)), without an exp that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def gate_of(gate, KIND: tl.constexpr):
    """The factor of a gated form that stands before the up projection, and its derivative."""
    if KIND == "swiglu":
        sigmoid = sigmoid_of(gate)
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif KIND == "shifted_swiglu":
        sigmoid = sigmoid_of(SLOPE * gate)
        return gate * sigmoid, sigmoid * (1.0 + SLOPE * gate * (1.0 - sigmoid))
    else:
        # (1 + tanh z) / 2 is sigmoid(2 z), which does not cancel for negative z.
        tl.static_assert(KIND == "geglu", "a gated form")
        square = gate * gate
        sigmoid = sigmoid_of(2.0 * ROOT * gate * (1.0 + CUBE * square))
        slope = 2.0 * ROOT * (1.0 + 3.0 * CUBE * square)
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid) * slope)


@triton.jit
def activate_gated(gate, up, gate_limit, up_limit, KIND: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """Active rows, and what multiplies their gradient into those of gate and up."""
    if HAS_LIMIT:
        is_gate_free, is_up_free = gate <= gate_limit, tl.abs(up) <= up_limit
        gate = tl.minimum(gate, gate_limit)
        up = tl.minimum(tl.maximum(up, -up_limit), up_limit)
    factor, slope = gate_of(gate, KIND)
    if KIND == "shifted_swiglu":
        up += 1.0
    by_gate, by_up = slope * up, factor
    if HAS_LIMIT:
        by_gate, by_up = tl.where(is_gate_free, by_gate, 0.0), tl.where(is_up_free, by_up, 0.0)
    return factor * up, by_gate, by_up


@triton.jit
def activate_plain(hidden):
    """relu(hidden)^2, and its derivative."""
    hidden = tl.maximum(hidden, 0.0)
    return hidden * hidden, 2.0 * hidden


@triton.jit
def round_on_side(x, limit, below, above):
    """x for a narrow dtype, on the side of the limit where it was: else its gradient appears or goes.

    below and above are the numbers of that dtype next to the limit: at most it, and beyond it.
    """
    return tl.where(x > limit, tl.maximum(x, above), tl.minimum(x, below))


@lru_cache
def gate_limit_of(kind: Kind, limit: float, clamps_product: bool) -> float:
    """The largest gate that is not clamped."""
    if not clamps_product:
        return limit
    # Both forms are less than one below their gate: the answer lies within one above the limit.
    assert kind in ("swiglu", "geglu"), f"{kind=}"
    low, high = limit, limit + 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _factor(middle, kind) <= limit else (low, middle)
    return low


def _factor(gate: float, kind: Kind) -> float:
    slope = 1.0 if kind == "swiglu" else 2 * ROOT.value * (1 + CUBE.value * gate * gate)
    return gate / (1 + math.exp(-gate * slope))
