"""Activations of feed-forwards in plain torch. Letters: N rows, F hidden.

The 2F columns of a gated form are the F gates, then the F ups.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

Kind = Literal["swiglu", "geglu", "shifted_swiglu", "relu2"]
SHIFTED_SLOPE = 1.702


def is_gated(kind: Kind) -> bool:
    """Whether the form multiplies a gate with an up projection."""
    return kind != "relu2"


def activate_direct(
    hidden: Float[Tensor, "*N F2"], kind: Kind, *, limit: float | None = None, clamps_product: bool = False
) -> Float[Tensor, "*N F"]:
    """The activation in the caller's dtype."""
    if kind == "relu2":
        return relu(hidden).square()
    gate, up = hidden.chunk(2, dim=-1)
    if limit is not None and not clamps_product:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if kind == "shifted_swiglu":
        return gate * torch.sigmoid(SHIFTED_SLOPE * gate) * (up + 1)
    gate = silu(gate) if kind == "swiglu" else gelu(gate, approximate="tanh")
    if limit is not None and clamps_product:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * up
