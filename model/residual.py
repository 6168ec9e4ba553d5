"""How a half of a block, mixer or feed-forward, reads from the residual stream and writes to it."""

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from kernels.sinkhorn import sinkhorn
from model.linear import Initial, LayerNorm, RMSNorm
from model.shape import ResidualConfig


def build_norm(width: int, config: ResidualConfig) -> nn.Module:
    """The norm of the residual stream."""
    if config.norm == "layer":
        return LayerNorm(width, config.norm_eps, has_bias=False)
    return RMSNorm(width, config.norm_eps, is_zero_centered=config.has_zero_centered_norm)


class Residual(nn.Module, ABC):
    """One half's access to the stream, which is [B T D], or [B T n D] with n streams."""

    def __init__(self, width: int, config: ResidualConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = build_norm(width, config)

    @abstractmethod
    def read(self, stream: Float[Tensor, "B T *n D"]) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, ...]]:
        """What the half works on, and what `write` needs later."""

    @abstractmethod
    def write(self, kept: tuple[Tensor, ...], out: Float[Tensor, "B T D"]) -> Float[Tensor, "B T *n D"]:
        """The stream with the half's output in it."""

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.config.dropout, self.training) if self.config.dropout else x


class PreNorm(Residual):
    """x + f(norm(x))."""

    def read(self, stream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The normed stream; the stream itself is kept."""
        return self.norm(stream), (stream,)

    def write(self, kept: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The sum."""
        return kept[0] + self._drop(out)


class Sandwich(PreNorm):
    """x + norm'(f(norm(x))): Gemma 2."""

    fusible = ("write",)

    def __init__(self, width: int, config: ResidualConfig) -> None:
        super().__init__(width, config)
        self.out_norm = build_norm(width, config)

    def write(self, kept: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The sum with the normed output."""
        return kept[0] + self._drop(self.out_norm(out))


class ScaledPostNorm(Residual):
    """alpha norm(x) + beta f(norm(x)): MiniMax-Text-01. The normed tensor is the residual."""

    fusible = ("write",)

    def read(self, stream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The normed stream, which is also kept."""
        normed = self.norm(stream)
        return normed, (normed,)

    def write(self, kept: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The weighted sum."""
        return self.config.alpha * kept[0] + self.config.beta * self._drop(out)


class Hyper(Residual):
    """Manifold-constrained hyper-connections over n streams, arXiv 2512.24880, as DeepSeek-V4 runs them.

    Each half reads a gated sum of the streams, writes its output to each by another gate, and mixes the
    streams by a matrix near the doubly stochastic ones. All three are functions of the streams.
    """

    # Twenty normalisations of a matrix drift in bfloat16.
    needs_full_precision = True
    fusible = ("read", "write")

    def __init__(self, width: int, config: ResidualConfig) -> None:
        super().__init__(width, config)
        streams = config.streams
        outputs = streams * (streams + 2)
        self.weight = nn.Parameter(torch.empty(outputs, streams * width))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.scale = nn.Parameter(torch.empty(3))
        # The scales start small, so that at first every token sees the same connections.
        self.initial = {
            "weight": Initial("normal", 0.0, (streams * width) ** -0.5, is_decayed=True, is_float32=True),
            "bias": Initial("normal", 0.0, 0.1, is_float32=True),
            "scale": Initial("constant", 0.1, is_float32=True),
        }

    def read(self, stream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The normed gated sum; streams, output gates and mixing matrix are kept."""
        config, n = self.config, self.config.streams
        gates = rms_linear(stream.flatten(-2), self.weight, config.norm_eps)
        dtype = gates.dtype
        into, out_of, between = gates.split([n, n, n * n], dim=-1)
        biases = self.bias.to(dtype).split([n, n, n * n])
        scale = self.scale.to(dtype)
        into = (into * scale[0] + biases[0]).sigmoid() + config.hyper_eps
        out_of = 2 * (out_of * scale[1] + biases[1]).sigmoid()
        between = (between * scale[2] + biases[2]).unflatten(-1, (n, n))
        between = sinkhorn(between, iterations=config.iterations, eps=config.hyper_eps)
        joined = (into[..., None] * stream).sum(-2).to(stream.dtype)
        return self.norm(joined), (stream, out_of.to(stream.dtype), between.to(stream.dtype))

    def write(self, kept: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Each stream: its gate times the output, plus the mix of all streams."""
        stream, out_of, between = kept
        mixed = cast(Tensor, MixStreams.apply(between, stream))
        return out_of[..., None] * self._drop(out)[..., None, :] + mixed


class MixStreams(torch.autograd.Function):
    """between [B T n n], stream [B T n D] -> between^T stream.

    Small products of transposed factors take ten times as long as a copy and a plain product.
    """

    @staticmethod
    def forward(ctx: Any, between: Tensor, stream: Tensor) -> Tensor:
        """One product per token."""
        ctx.save_for_backward(between, stream)
        return between.mT.contiguous() @ stream

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both factors."""
        between, stream = ctx.saved_tensors
        return stream @ grads[0].mT.contiguous(), between.contiguous() @ grads[0].contiguous()


class Collapse(nn.Module):
    """One stream from n: their mean, or a learned gated sum (DeepSeek-V4)."""

    needs_full_precision = True

    def __init__(self, width: int, config: ResidualConfig) -> None:
        super().__init__()
        self.config = config
        if config.has_learned_collapse:
            streams = config.streams
            self.weight = nn.Parameter(torch.empty(streams, streams * width))
            self.bias = nn.Parameter(torch.empty(streams))
            self.scale = nn.Parameter(torch.empty(1))
            self.initial = {
                "weight": Initial("normal", 0.0, (streams * width) ** -0.5, is_decayed=True, is_float32=True),
                "bias": Initial("normal", 0.0, 0.1, is_float32=True),
                "scale": Initial("constant", 0.1, is_float32=True),
            }

    def forward(self, stream: Float[Tensor, "B T n D"]) -> Float[Tensor, "B T D"]:
        """In the dtype of the streams."""
        if not self.config.has_learned_collapse:
            return stream.mean(-2)
        gates = rms_linear(stream.flatten(-2), self.weight, self.config.norm_eps)
        gates = gates * self.scale.to(gates.dtype) + self.bias.to(gates.dtype)
        gates = gates.sigmoid() + self.config.hyper_eps
        return (gates[..., None] * stream).sum(-2).to(stream.dtype)


def rms_linear(x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"], eps: float) -> Float[Tensor, "*N O"]:
    """x over its root mean square, times weight^T, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return cast(Tensor, _RmsLinear.apply(x, weight.to(dtype), eps))


class _RmsLinear(torch.autograd.Function):
    """x [*N I], weight [O I] -> [*N O].

    Backward reads x as it is: wide copies of n streams, before and after the norm, would outweigh all else
    that a layer keeps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The product is scaled, which has far fewer numbers than x."""
        wide = x.to(weight.dtype)
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        out = linear(wide, weight) * scale
        ctx.save_for_backward(x, weight, scale, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of both factors."""
        x, weight, scale, out = ctx.saved_tensors
        wide, grad = x.to(weight.dtype), grads[0] * scale
        along = (grads[0] * out).sum(-1, keepdim=True) * scale.square() / x.shape[-1]
        grad_weight = grad.flatten(0, -2).mT @ wide.flatten(0, -2)
        return (grad @ weight - along * wide).to(x.dtype), grad_weight, None


def build_residual(width: int, config: ResidualConfig) -> Residual:
    """One half's access to the stream."""
    kinds = {"pre_norm": PreNorm, "sandwich": Sandwich, "scaled_post_norm": ScaledPostNorm, "hyper": Hyper}
    return kinds[config.kind](width, config)


def build_collapse(width: int, config: ResidualConfig) -> Collapse | None:
    """What makes one stream from all; None where there is only one."""
    return Collapse(width, config) if config.kind == "hyper" else None


def open_streams(x: Float[Tensor, "B T D"], config: ResidualConfig) -> Float[Tensor, "B T *n D"]:
    """x as every stream, or x itself where there is only one."""
    return x[:, :, None].expand(-1, -1, config.streams, -1) if config.kind == "hyper" else x
