"""Short causal convolution in Triton: one program makes some tokens of some channels.

Letters: B rows, T tokens, D channels, W taps. Tokens before the row, from -(W - 1) on, are the initial state.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require

MAX_TAPS = 16


class Tiles(NamedTuple):
    """Tokens and channels of a program, and its warps."""

    tokens: int
    channels: int
    warps: int


@triton.jit
def convolution_read(
    x, initial_state, document, first, shifts, channel, row, tokens, channels, row_stride, token_stride, own,
    TAPS: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
):  # fmt: skip
    """x at tokens `first` + `shifts`, before the row the initial state; zero where the document is not `own`.

    Only the address of `first` is wide: 64-bit offsets of every token would take the registers.
    """
    is_channel = (channel < channels)[None, :]
    token = first + shifts
    is_in = (token >= 0) & (token < tokens)
    if HAS_DOCUMENT:
        found = tl.load(document + row * tokens + tl.minimum(tl.maximum(token, 0), tokens - 1))
        is_in = is_in & (found == own)
    x_first = x + row * row_stride + first.to(tl.int64) * token_stride
    # In this order of the sums: the offsets added up first are spilled (Triton 3.6).
    x_ptrs = x_first + shifts[:, None] * token_stride + channel[None, :]
    value = tl.load(x_ptrs, mask=is_in[:, None] & is_channel, other=0.0).to(tl.float32)
    if HAS_INITIAL_STATE:
        is_before = (token < 0) & (token >= 1 - TAPS)
        if HAS_DOCUMENT:
            is_before = is_before & (own == tl.load(document + row * tokens))
        state_ptrs = initial_state + row * (TAPS - 1) * channels + (token + TAPS - 1)[:, None] * channels
        state_ptrs += channel[None, :]
        value += tl.load(state_ptrs, mask=is_before[:, None] & is_channel, other=0.0).to(tl.float32)
    return value


@triton.jit
def convolution_sum(
    x, initial_state, weight, bias, document, first, shifts, channel, row, tokens, channels,
    row_stride, token_stride,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
):  # fmt: skip
    """The sum over taps at `first` + `shifts`, before SiLU, and the document there."""
    token = first + shifts
    own = token * 0
    if HAS_DOCUMENT:
        own = tl.load(document + row * tokens + tl.minimum(tl.maximum(token, 0), tokens - 1))
    is_channel = channel < channels
    total = tl.zeros([shifts.shape[0], channel.shape[0]], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for shift in tl.static_range(TAPS):
        tap = tl.load(weight + channel * TAPS + TAPS - 1 - shift, mask=is_channel, other=0.0)
        total += tap.to(tl.float32)[None, :] * convolution_read(
            x, initial_state, document, first, shifts - shift, channel, row, tokens, channels, row_stride,
            token_stride, own, TAPS, HAS_INITIAL_STATE, HAS_DOCUMENT,
        )  # fmt: skip
    return total, own


@triton.jit
def convolution_forward(
    x, initial_state, weight, bias, document, out, tokens, channels, row_stride, token_stride,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
    HAS_SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the convolution."""
    row = tl.program_id(2).to(tl.int64)
    first, shifts = tl.program_id(0) * TOKENS, tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total, _ = convolution_sum(
        x, initial_state, weight, bias, document, first, shifts, channel, row, tokens, channels, row_stride,
        token_stride, TAPS, HAS_BIAS, HAS_INITIAL_STATE, HAS_DOCUMENT,
    )  # fmt: skip
    if HAS_SILU:
        total = total * tl.sigmoid(total)
    out_ptrs = out + (row * tokens + first) * channels + shifts[:, None] * channels + channel[None, :]
    is_in = (first + shifts < tokens)[:, None] & (channel < channels)[None, :]
    tl.store(out_ptrs, total.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def convolution_backward(
    x, initial_state, weight, bias, document, grad, grad_x, grad_initial_state, partial, partial_bias,
    tokens, channels, row_stride, token_stride,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
    HAS_SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of x, the initial state included, and the tile's part of those of the taps.

    A token's gradient comes from the sums at it and at the TAPS - 1 tokens behind it.
    """
    row = tl.program_id(2).to(tl.int64)
    first, shifts = tl.program_id(0) * TOKENS, tl.arange(0, TOKENS)
    if HAS_INITIAL_STATE:
        first -= TAPS - 1
    token = first + shifts
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    own = token * 0
    if HAS_DOCUMENT:
        own = tl.load(document + row * tokens + tl.minimum(tl.maximum(token, 0), tokens - 1))
    value = convolution_read(
        x, initial_state, document, first, shifts, channel, row, tokens, channels, row_stride, token_stride,
        own, TAPS, HAS_INITIAL_STATE, HAS_DOCUMENT,
    )  # fmt: skip
    total_grad = tl.zeros([TOKENS, CHANNELS], tl.float32)
    number = (row * tl.num_programs(0) + tl.program_id(0)) * TAPS
    for shift in tl.static_range(TAPS):
        later = token + shift
        is_in = (later >= 0) & (later < tokens)
        grad_ptrs = grad + (row * tokens + first) * channels + (shifts + shift)[:, None] * channels
        grad_ptrs += channel[None, :]
        g = tl.load(grad_ptrs, mask=is_in[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        total, there = convolution_sum(
            x, initial_state, weight, bias, document, first, shifts + shift, channel, row, tokens, channels,
            row_stride, token_stride, TAPS, HAS_BIAS, HAS_INITIAL_STATE, HAS_DOCUMENT,
        )  # fmt: skip
        if HAS_SILU:
            share = tl.sigmoid(total)
            g = g * share * (1.0 + total * (1.0 - share))
        if HAS_BIAS and shift == 0:
            bias_ptrs = partial_bias + (row * tl.num_programs(0) + tl.program_id(0)) * channels + channel
            tl.store(bias_ptrs, tl.sum(g, axis=0), mask=is_channel)
        if HAS_DOCUMENT:
            g = tl.where((there == own)[:, None], g, 0.0)
        tap = tl.load(weight + channel * TAPS + TAPS - 1 - shift, mask=is_channel, other=0.0)
        total_grad += tap.to(tl.float32)[None, :] * g
        partial_ptrs = partial + (number + TAPS - 1 - shift) * channels + channel
        tl.store(partial_ptrs, tl.sum(g * value, axis=0), mask=is_channel)
    is_in = (token >= 0) & (token < tokens)
    x_ptrs = grad_x + (row * tokens + first) * channels + shifts[:, None] * channels + channel[None, :]
    tl.store(x_ptrs, total_grad.to(grad_x.dtype.element_ty), mask=is_in[:, None] & is_channel[None, :])
    if HAS_INITIAL_STATE:
        state_ptrs = grad_initial_state + row * (TAPS - 1) * channels + (token + TAPS - 1)[:, None] * channels
        state_ptrs += channel[None, :]
        is_before = (token < 0)[:, None] & is_channel[None, :]
        tl.store(state_ptrs, total_grad.to(grad_initial_state.dtype.element_ty), mask=is_before)


class ShortConvolutionTriton(torch.autograd.Function):
    """x [B T D], weight [D W], bias [D], initial_state [B W-1 D] -> [B T D]; keeps only its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        document: Tensor | None,
        has_silu: bool,
        tiles: Tiles,
    ) -> Tensor:
        """One launch."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ctx.save_for_backward(x, weight, bias, initial_state, document)
        ctx.options = (has_silu, tiles)
        rows, tokens, channels = x.shape
        grid = (triton.cdiv(tokens, tiles.tokens), triton.cdiv(channels, tiles.channels), rows)
        sizes = (tokens, channels, x.stride(0), x.stride(1))
        convolution_forward[grid](
            x, initial_state, weight, bias, document, out, *sizes,
            **_flags(weight, bias, initial_state, document),
            HAS_SILU=has_silu, TOKENS=tiles.tokens, CHANNELS=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch, and sums of the programs' parts."""
        x, weight, bias, initial_state, document = ctx.saved_tensors
        has_silu, tiles = ctx.options
        rows, tokens, channels = x.shape
        taps = weight.shape[1]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_initial_state = None if initial_state is None else torch.empty_like(initial_state)
        before = 0 if initial_state is None else taps - 1
        blocks = triton.cdiv(tokens + before, tiles.tokens)
        sums = torch.empty(rows * blocks, taps, channels, dtype=torch.float32, device=x.device)
        bias_sums = None if bias is None else torch.empty_like(sums[:, 0])
        grid = (blocks, triton.cdiv(channels, tiles.channels), rows)
        sizes = (tokens, channels, x.stride(0), x.stride(1))
        convolution_backward[grid](
            x, initial_state, weight, bias, document, grads[0].contiguous(), grad_x, grad_initial_state,
            sums, bias_sums, *sizes, **_flags(weight, bias, initial_state, document),
            HAS_SILU=has_silu, TOKENS=tiles.tokens, CHANNELS=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
        grad_weight = sums.sum(0).T.to(weight.dtype)
        grad_bias = None if bias is None or bias_sums is None else bias_sums.sum(0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_initial_state, None, None, None


def _flags(
    weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, document: Tensor | None
) -> dict[str, Any]:
    return {
        "TAPS": weight.shape[1],
        "HAS_BIAS": bias is not None,
        "HAS_INITIAL_STATE": initial_state is not None,
        "HAS_DOCUMENT": document is not None,
    }


def short_convolution_triton(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, "D"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B U D"] | None = None,
    has_silu: bool = True,
    tiles: Tiles | None = None,
) -> Float[Tensor, "B T D"]:
    """`kernels.convolution.short_convolution`. Raises ValueError for more than MAX_TAPS taps."""
    require(weight.shape[1] <= MAX_TAPS, "weight", f"at most {MAX_TAPS} taps", weight.shape[1])
    x = x if x.stride(2) == 1 else x.contiguous()
    document = None if document is None else document.contiguous()
    if initial_state is not None:
        initial_state = initial_state.contiguous() if initial_state.shape[1] else None
    bias = None if bias is None else bias.contiguous()
    tiles = tiles or Tiles(16, 128, 4)
    out = ShortConvolutionTriton.apply(x, weight.contiguous(), bias, initial_state, document, has_silu, tiles)
    return cast(Tensor, out)
