"""Short causal convolution in Triton: one program makes some tokens of some channels.

Letters: B rows, T tokens, D channels, W taps. Places before the row, from -(W - 1) on, lie in the state.
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
    x, state, document, first, shifts, channel, row, tokens, channels, row_stride, token_stride, own,
    TAPS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
):  # fmt: skip
    """x at `first` + `shifts`, from the state before the row, and zero where the document is not `own`.

    Only the address of `first` is wide: numbers of 64 bits for every place would take the registers.
    """
    is_channel = (channel < channels)[None, :]
    place = first + shifts
    is_in = (place >= 0) & (place < tokens)
    if HAS_DOCUMENT:
        found = tl.load(document + row * tokens + tl.minimum(tl.maximum(place, 0), tokens - 1))
        is_in = is_in & (found == own)
    near = x + row * row_stride + first.to(tl.int64) * token_stride
    numbers = near + shifts[:, None] * token_stride + channel[None, :]
    value = tl.load(numbers, mask=is_in[:, None] & is_channel, other=0.0).to(tl.float32)
    if HAS_STATE:
        is_before = (place < 0) & (place >= 1 - TAPS)
        if HAS_DOCUMENT:
            is_before = is_before & (own == tl.load(document + row * tokens))
        numbers = state + row * (TAPS - 1) * channels + (place + TAPS - 1)[:, None] * channels
        numbers += channel[None, :]
        value += tl.load(numbers, mask=is_before[:, None] & is_channel, other=0.0).to(tl.float32)
    return value


@triton.jit
def convolution_sum(
    x, state, weight, bias, document, first, shifts, channel, row, tokens, channels, row_stride, token_stride,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
):  # fmt: skip
    """The sum over taps at `first` + `shifts`, before SiLU, and the document there."""
    place = first + shifts
    own = place * 0
    if HAS_DOCUMENT:
        own = tl.load(document + row * tokens + tl.minimum(tl.maximum(place, 0), tokens - 1))
    is_channel = channel < channels
    total = tl.zeros([shifts.shape[0], channel.shape[0]], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for shift in tl.static_range(TAPS):
        tap = tl.load(weight + channel * TAPS + TAPS - 1 - shift, mask=is_channel, other=0.0)
        total += tap.to(tl.float32)[None, :] * convolution_read(
            x, state, document, first, shifts - shift, channel, row, tokens, channels, row_stride,
            token_stride, own, TAPS, HAS_STATE, HAS_DOCUMENT,
        )  # fmt: skip
    return total, own


@triton.jit
def convolution_forward(
    x, state, weight, bias, document, out, tokens, channels, row_stride, token_stride,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
    HAS_SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the convolution."""
    row = tl.program_id(2).to(tl.int64)
    first, shifts = tl.program_id(0) * TOKENS, tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total, _ = convolution_sum(
        x, state, weight, bias, document, first, shifts, channel, row, tokens, channels, row_stride,
        token_stride, TAPS, HAS_BIAS, HAS_STATE, HAS_DOCUMENT,
    )  # fmt: skip
    if HAS_SILU:
        total = total * tl.sigmoid(total)
    target = out + (row * tokens + first) * channels + shifts[:, None] * channels + channel[None, :]
    is_in = (first + shifts < tokens)[:, None] & (channel < channels)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def convolution_backward(
    x, state, weight, bias, document, grad, grad_x, grad_state, partial, partial_bias,
    tokens, channels, row_stride, token_stride,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
    HAS_SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of x, the state before it included, and the tile's part of those of the taps.

    A token's gradient comes from the sums at it and at the TAPS - 1 tokens behind it.
    """
    row = tl.program_id(2).to(tl.int64)
    first, shifts = tl.program_id(0) * TOKENS, tl.arange(0, TOKENS)
    if HAS_STATE:
        first -= TAPS - 1
    place = first + shifts
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    own = place * 0
    if HAS_DOCUMENT:
        own = tl.load(document + row * tokens + tl.minimum(tl.maximum(place, 0), tokens - 1))
    value = convolution_read(
        x, state, document, first, shifts, channel, row, tokens, channels, row_stride, token_stride,
        own, TAPS, HAS_STATE, HAS_DOCUMENT,
    )  # fmt: skip
    into = tl.zeros([TOKENS, CHANNELS], tl.float32)
    number = (row * tl.num_programs(0) + tl.program_id(0)) * TAPS
    for shift in tl.static_range(TAPS):
        later = place + shift
        is_in = (later >= 0) & (later < tokens)
        source = grad + (row * tokens + first) * channels + (shifts + shift)[:, None] * channels
        source += channel[None, :]
        g = tl.load(source, mask=is_in[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        total, there = convolution_sum(
            x, state, weight, bias, document, first, shifts + shift, channel, row, tokens, channels,
            row_stride, token_stride, TAPS, HAS_BIAS, HAS_STATE, HAS_DOCUMENT,
        )  # fmt: skip
        if HAS_SILU:
            share = tl.sigmoid(total)
            g = g * share * (1.0 + total * (1.0 - share))
        if HAS_BIAS and shift == 0:
            own_bias = partial_bias + (row * tl.num_programs(0) + tl.program_id(0)) * channels + channel
            tl.store(own_bias, tl.sum(g, axis=0), mask=is_channel)
        if HAS_DOCUMENT:
            g = tl.where((there == own)[:, None], g, 0.0)
        tap = tl.load(weight + channel * TAPS + TAPS - 1 - shift, mask=is_channel, other=0.0)
        into += tap.to(tl.float32)[None, :] * g
        line = partial + (number + TAPS - 1 - shift) * channels + channel
        tl.store(line, tl.sum(g * value, axis=0), mask=is_channel)
    is_in = (place >= 0) & (place < tokens)
    target = grad_x + (row * tokens + first) * channels + shifts[:, None] * channels + channel[None, :]
    tl.store(target, into.to(grad_x.dtype.element_ty), mask=is_in[:, None] & is_channel[None, :])
    if HAS_STATE:
        target = grad_state + row * (TAPS - 1) * channels + (place + TAPS - 1)[:, None] * channels
        target += channel[None, :]
        is_before = (place < 0)[:, None] & is_channel[None, :]
        tl.store(target, into.to(grad_state.dtype.element_ty), mask=is_before)


class ShortConvolutionTriton(torch.autograd.Function):
    """x [B T D], weight [D W], bias [D], state [B W-1 D] -> [B T D]; keeps only its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        document: Tensor | None,
        has_silu: bool,
        tiles: Tiles,
    ) -> Tensor:
        """One launch."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ctx.save_for_backward(x, weight, bias, state, document)
        ctx.form = (has_silu, tiles)
        rows, tokens, channels = x.shape
        grid = (triton.cdiv(tokens, tiles.tokens), triton.cdiv(channels, tiles.channels), rows)
        sizes = (tokens, channels, x.stride(0), x.stride(1))
        convolution_forward[grid](
            x, state, weight, bias, document, out, *sizes, **_flags(weight, bias, state, document),
            HAS_SILU=has_silu, TOKENS=tiles.tokens, CHANNELS=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch, and sums of the programs' parts."""
        x, weight, bias, state, document = ctx.saved_tensors
        has_silu, tiles = ctx.form
        rows, tokens, channels = x.shape
        taps = weight.shape[1]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_state = None if state is None else torch.empty_like(state)
        before = 0 if state is None else taps - 1
        blocks = triton.cdiv(tokens + before, tiles.tokens)
        sums = torch.empty(rows * blocks, taps, channels, dtype=torch.float32, device=x.device)
        bias_sums = None if bias is None else torch.empty_like(sums[:, 0])
        grid = (blocks, triton.cdiv(channels, tiles.channels), rows)
        sizes = (tokens, channels, x.stride(0), x.stride(1))
        convolution_backward[grid](
            x, state, weight, bias, document, grads[0].contiguous(), grad_x, grad_state, sums, bias_sums,
            *sizes, **_flags(weight, bias, state, document),
            HAS_SILU=has_silu, TOKENS=tiles.tokens, CHANNELS=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
        grad_weight = sums.sum(0).T.to(weight.dtype)
        grad_bias = None if bias is None or bias_sums is None else bias_sums.sum(0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_state, None, None, None


def _flags(
    weight: Tensor, bias: Tensor | None, state: Tensor | None, document: Tensor | None
) -> dict[str, Any]:
    return {
        "TAPS": weight.shape[1],
        "HAS_BIAS": bias is not None,
        "HAS_STATE": state is not None,
        "HAS_DOCUMENT": document is not None,
    }


def short_convolution_triton(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, "D"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
    state: Float[Tensor, "B U D"] | None = None,
    has_silu: bool = True,
    tiles: Tiles | None = None,
) -> Float[Tensor, "B T D"]:
    """`kernels.convolution.short_convolution`. Raises ValueError for more than MAX_TAPS taps."""
    require(weight.shape[1] <= MAX_TAPS, "weight", f"at most {MAX_TAPS} taps", weight.shape[1])
    x = x if x.stride(2) == 1 else x.contiguous()
    document = None if document is None else document.contiguous()
    state = None if state is None or state.shape[1] == 0 else state.contiguous()
    bias = None if bias is None else bias.contiguous()
    tiles = tiles or Tiles(16, 128, 4)
    out = ShortConvolutionTriton.apply(x, weight.contiguous(), bias, state, document, has_silu, tiles)
    return cast(Tensor, out)
