"""Parameters and how they start: linear maps, normalisation, embeddings.

Weights are kept in the precision that the optimizer sees and are cast where they are used, so that one
module trains in float64, float32, or bfloat16 with float32 master weights.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, silu

from kernels.norm import Gate, gated_rms_norm, rms_norm
from model.tensor_shards import ALL_HEADS, HeadShards


class Initial(NamedTuple):
    """How a parameter starts, and how it is treated.

    is_decayed: weight decay is for matrices of products, and nothing else. is_float32: no cast narrows it; a
    rounded rate, sink or gate changes a model more than a rounded matrix.
    normal: mean `a`, standard deviation `b`. constant: `a`. uniform: U(a, b). log_of_uniform: log U(a, b).
    inverse_softplus_of_log_uniform: y with softplus(y) = exp(U(log a, log b)).
    """

    kind: str
    a: float
    b: float = 0.0
    is_decayed: bool = False
    is_float32: bool = False

    def sample(self, shape: torch.Size, generator: torch.Generator) -> Float[Tensor, "..."]:
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
    """x times weight transposed, plus bias if there is one, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, init_std: float, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if has_bias else None
        # Set from outside where outputs of several ranks are summed.
        self.bias_share = 1.0
        self.initial = {"weight": Initial("normal", 0.0, init_std, is_decayed=True)}
        if has_bias:
            self.initial["bias"] = Initial("constant", 0.0)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """The product; accumulation is the device's own for the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if bias is not None and self.bias_share != 1.0:
            bias = bias * self.bias_share
        return linear(x, self.weight.to(x.dtype), bias)


def wide_linear(x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*N O"]:
    """x weight^T in the dtype of weight, which may be wider than that of x.

    Backward reads x as it is: a wide copy that waits for it would take twice the bytes of x.
    """
    if x.dtype == weight.dtype:
        return linear(x, weight)
    return cast(Tensor, _WideLinear.apply(x, weight))


class _WideLinear(torch.autograd.Function):
    """x [*N I], weight [O I] -> [*N O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The product with a wide copy of x."""
        ctx.save_for_backward(x, weight)
        return linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both factors."""
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_x = (grad @ weight).to(x.dtype).view_as(x)
        return grad_x, grad.mT @ x.flatten(0, -2).to(weight.dtype)


class RMSNorm(nn.Module):
    """x over its root mean square along the last dim, times weight, or 1 + weight if zero-centred."""

    def __init__(self, dim: int, eps: float, *, is_zero_centered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.initial = {"weight": Initial("constant", 0.0 if is_zero_centered else 1.0)}
        self.eps, self.is_zero_centered = eps, is_zero_centered

    def forward(self, x: Float[Tensor, "*N D"], head_shards: HeadShards = ALL_HEADS) -> Float[Tensor, "*N D"]:
        """Statistics and product in float32 at least; the result has the dtype of x.

        With head_shards of several ranks the root mean square is that of all their shares.
        """
        if head_shards.size > 1:
            weight = self.weight + 1.0 if self.is_zero_centered else self.weight
            return (_normed(x, self.eps, head_shards) * weight).to(x.dtype)
        return rms_norm(x, self.weight, self.eps, is_zero_centered=self.is_zero_centered)


class GatedRMSNorm(nn.Module):
    """x over its root mean square along the last dim, times weight, times an activated gate."""

    def __init__(self, dim: int, eps: float, kind: Gate) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.initial = {"weight": Initial("constant", 1.0)}
        self.eps = eps
        self.kind: Gate = kind

    def forward(
        self, x: Float[Tensor, "*N D"], gate: Float[Tensor, "*N D"], head_shards: HeadShards = ALL_HEADS
    ) -> Float[Tensor, "*N D"]:
        """Computed in float32 at least; the result has the dtype of the gate.

        With head_shards of several ranks the root mean square is that of all their shares.
        """
        if head_shards.size > 1:
            wide = _normed(x, self.eps, head_shards)
            activated = silu(gate.to(wide.dtype)) if self.kind == "silu" else gate.to(wide.dtype).sigmoid()
            return (wide * self.weight * activated).to(gate.dtype)
        return gated_rms_norm(x, gate, self.weight[None], self.eps, kind=self.kind)


def _normed(x: Float[Tensor, "*N D"], eps: float, head_shards: HeadShards) -> Float[Tensor, "*N D"]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = head_shards.sum(wide.square().sum(-1, keepdim=True)) / (x.shape[-1] * head_shards.size)
    return wide * (mean + eps).rsqrt()


class LayerNorm(nn.Module):
    """x less its mean, over its standard deviation, times weight, plus bias if there is one."""

    def __init__(self, dim: int, eps: float, *, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if has_bias else None
        self.initial = {"weight": Initial("constant", 1.0)}
        if has_bias:
            self.initial["bias"] = Initial("constant", 0.0)
        self.eps = eps

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Statistics and product in float32 at least; the result has the dtype of x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), bias, self.eps).to(x.dtype)
