"""Parameters and how they start: linear maps, normalisation, embeddings.

Weights are kept in the precision that the optimizer sees and are cast where they are used, so that one
module trains in float64, float32, or bfloat16 with float32 master weights.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from kernels.norm import rms_norm


class Initial(NamedTuple):
    """How a parameter starts.

    normal: mean `a`, standard deviation `b`. constant: `a`. uniform: U(a, b). log_of_uniform: log U(a, b).
    inverse_softplus_of_log_uniform: y with softplus(y) = exp(U(log a, log b)).
    """

    kind: str
    a: float
    b: float = 0.0

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Float[Tensor, "..."]:
        """Values in float32 on the generator's device."""
        out = torch.empty(shape, dtype=torch.float32, device=generator.device)
        if self.kind == "normal":
            return out.normal_(self.a, self.b, generator=generator)
        if self.kind == "constant":
            return out.fill_(self.a)
        if self.kind == "uniform":
            return out.uniform_(self.a, self.b, generator=generator)
        if self.kind == "log_of_uniform":
            return out.uniform_(self.a, self.b, generator=generator).log_()
        assert self.kind == "inverse_softplus_of_log_uniform", f"{self.kind=}"
        y = out.uniform_(math.log(self.a), math.log(self.b), generator=generator).exp_()
        return y + torch.log(-torch.expm1(-y))


class Linear(nn.Module):
    """x times weight transposed, without bias, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.initial = {"weight": Initial("normal", 0.0, init_std)}

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """The product; accumulation is the device's own for the dtype of x."""
        return linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x over its root mean square along the last dim, times weight, or 1 + weight if zero-centred."""

    def __init__(self, dim: int, eps: float, *, is_zero_centered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.initial = {"weight": Initial("constant", 0.0 if is_zero_centered else 1.0)}
        self.eps, self.is_zero_centered = eps, is_zero_centered

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Statistics and product in float32 at least; the result has the dtype of x."""
        weight = self.weight + 1.0 if self.is_zero_centered else self.weight
        return rms_norm(x, weight, self.eps)
