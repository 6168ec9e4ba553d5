"""Compressors in Triton: gathering windows, and softmax over the tokens of a window for each channel.

Letters: B rows, T tokens, N slots, G heads, K dim of an entry, L or C tokens of a window, E channels.
Slots without a window come out as zero, and give no gradient.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import silu

from kernels.arguments import require
from kernels.document_windows import Windows


class Tiles(NamedTuple):
    """Tokens and channels that a program takes at a time, windows that it goes through, and its warps."""

    tokens: int
    channels: int
    windows: int
    warps: int


@triton.jit
def compress_gather(
    x, place, start, is_filled, out, tokens, slots, length, heads, dim, x_row, x_token, x_head,
    HAS_PLACE: tl.constexpr, MEAN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One window of one head: its tokens plus their places, [G B N L K], or their mean, [B N G K]."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.program_id(0)
    entry = row * slots + slot
    first = tl.load(start + entry)
    filled = tl.load(is_filled + entry)
    channel = tl.arange(0, CHANNELS)
    token = tl.arange(0, TOKENS)
    total = tl.zeros([CHANNELS], tl.float32)
    for begin in range(0, length, TOKENS):
        offset = begin + token
        is_in = (offset < length)[:, None] & (channel < dim)[None, :]
        source = x + row * x_row + first * x_token + head * x_head
        source += offset[:, None] * x_token + channel[None, :]
        value = tl.load(source, mask=is_in & filled, other=0.0).to(tl.float32)
        if HAS_PLACE:
            at = place + (head * length + offset)[:, None] * dim + channel[None, :]
            value += tl.load(at, mask=is_in & filled, other=0.0).to(tl.float32)
        if MEAN:
            total += tl.sum(value, axis=0)
        else:
            line = (head * tl.num_programs(1) * slots + entry) * length
            target = out + (line + offset)[:, None] * dim + channel[None, :]
            tl.store(target, value.to(out.dtype.element_ty), mask=is_in)
    if MEAN:
        target = out + (entry * heads + head) * dim + channel
        tl.store(target, (total / length).to(out.dtype.element_ty), mask=channel < dim)


@triton.jit
def compress_scatter(
    grad, start, is_filled, grad_x, tokens, slots, length, stride, heads, dim, candidates,
    MEAN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The adjoint of `compress_gather`: for some tokens of one head the sum over the windows they are in."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    is_in = (token < tokens)[:, None] & (channel < dim)[None, :]
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for back in range(candidates):
        # The window of slot n starts in [n stride, (n + 1) stride).
        slot = token // stride - back
        is_slot = (slot >= 0) & (slot < slots) & (token < tokens)
        entry = row * slots + tl.where(is_slot, slot, 0)
        first = tl.load(start + entry, mask=is_slot, other=0)
        filled = tl.load(is_filled + entry, mask=is_slot, other=0) != 0
        offset = token - first
        is_covered = is_slot & filled & (offset >= 0) & (offset < length)
        if MEAN:
            source = grad + ((entry * heads + head) * dim)[:, None] + channel[None, :]
        else:
            line = (head * tl.num_programs(1) * slots + entry) * length + offset
            source = grad + line[:, None] * dim + channel[None, :]
        value = tl.load(source, mask=is_covered[:, None] & is_in, other=0.0).to(tl.float32)
        total += value / length if MEAN else value
    target = grad_x + ((row * tokens + token) * heads + head)[:, None] * dim + channel[None, :]
    tl.store(target, total.to(grad_x.dtype.element_ty), mask=is_in)


class GatherWindows(torch.autograd.Function):
    """x [B T G K], place [G L K] or None -> tokens of windows [G B N L K], or means [B N G K]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, place: Tensor | None, windows: Windows, is_mean: bool, tiles: Tiles
    ) -> Tensor:
        """One launch."""
        rows, tokens, heads, dim = x.shape
        slots, length = windows.start.shape[1], windows.length
        shape = (rows, slots, heads, dim) if is_mean else (heads, rows, slots, length, dim)
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        compress_gather[(slots, rows, heads)](
            x, place, windows.start, windows.is_filled, out, tokens, slots, length, heads, dim,
            *x.stride()[:3], HAS_PLACE=place is not None, MEAN=is_mean, TOKENS=tiles.tokens,
            CHANNELS=triton.next_power_of_2(dim), num_warps=tiles.warps,
        )  # fmt: skip
        ctx.save_for_backward(windows.start, windows.is_filled)
        ctx.form = (x.shape, x.dtype, windows.length, windows.stride, is_mean, tiles)
        ctx.place_dtype = None if place is None else place.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch, and a sum over windows for the places."""
        start, is_filled = ctx.saved_tensors
        shape, dtype, length, stride, is_mean, tiles = ctx.form
        rows, tokens, heads, dim = shape
        grad = grads[0].contiguous()
        grad_x = torch.empty(shape, dtype=dtype, device=grad.device)
        block = tiles.tokens
        candidates = triton.cdiv(length, stride) + 1
        compress_scatter[(triton.cdiv(tokens, block), rows, heads)](
            grad, start, is_filled, grad_x, tokens, start.shape[1], length, stride, heads, dim, candidates,
            MEAN=is_mean, TOKENS=block, CHANNELS=triton.next_power_of_2(dim), num_warps=tiles.warps,
        )  # fmt: skip
        grad_place = None
        if ctx.place_dtype is not None:
            kept = grad * is_filled[None, :, :, None, None]
            grad_place = kept.sum((1, 2), dtype=torch.float32).to(ctx.place_dtype)
        return grad_x, grad_place, None, None, None


@triton.jit
def compress_gate_tile(
    values, gates, bias, row, begin, offset, channel, tokens, width, length, line, dim, is_part,
    values_row, values_token, gates_row, gates_token,
):  # fmt: skip
    """Values and biased gates of tokens `begin` + `offset`, one part of the channels; -inf where none is."""
    is_in = (is_part & (offset < length))[:, None] & (channel < dim)[None, :]
    lane = line * dim + channel
    near = values + row * values_row + begin * values_token
    value = tl.load(near + offset[:, None] * values_token + lane[None, :], mask=is_in, other=0.0)
    near = gates + row * gates_row + begin * gates_token
    gate = tl.load(near + offset[:, None] * gates_token + lane[None, :], mask=is_in, other=0.0)
    shift = tl.load(bias + offset[:, None] * width + lane[None, :], mask=is_in, other=0.0)
    gate = tl.where(is_in, gate.to(tl.float32) + shift.to(tl.float32), float("-inf"))
    return value.to(tl.float32), gate, is_in


@triton.jit
def compress_gated_forward(
    values, gates, bias, start, is_filled, position, out, lse, tokens, slots, length, dim,
    values_row, values_token, gates_row, gates_token,
    PARTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One entry: an online softmax over the tokens of its parts; the earlier part first."""
    row = tl.program_id(1).to(tl.int64)
    entry = row * slots + tl.program_id(0)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.load(start + entry)
    filled = tl.load(is_filled + entry) != 0
    first = tl.where(filled, first, 0)
    has_before = tl.load(position + row * tokens + first) > 0
    top = tl.full([CHANNELS], float("-inf"), tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    mixed = tl.zeros([CHANNELS], tl.float32)
    for part in tl.static_range(PARTS):
        is_part = filled
        begin = first
        if part == 0 and PARTS == 2:
            is_part = filled & has_before
            begin = first - length
        for step in range(0, length, TOKENS):
            offset = step + tl.arange(0, TOKENS)
            value, gate, _ = compress_gate_tile(
                values, gates, bias, row, begin, offset, channel, tokens, PARTS * dim, length, part, dim,
                is_part, values_row, values_token, gates_row, gates_token,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(gate, axis=0))
            # Where nothing was seen yet, zero stands for the top: minus infinity has no difference.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp(gate - safe[None, :])
            kept = tl.exp(top - safe)
            total = total * kept + tl.sum(weight, axis=0)
            mixed = mixed * kept + tl.sum(weight * value, axis=0)
            top = higher
    is_channel = channel < dim
    total = tl.where(total > 0, total, 1.0)
    result = tl.where(filled, mixed / total, 0.0)
    tl.store(out + entry * dim + channel, result.to(out.dtype.element_ty), mask=is_channel)
    tl.store(lse + entry * dim + channel, top + tl.log(total), mask=is_channel & filled)


@triton.jit
def compress_gated_backward(
    values, gates, bias, start, is_filled, position, out, lse, grad, grad_values, grad_gates, partial,
    tokens, slots, length, dim, steps, values_row, values_token, gates_row, gates_token,
    PARTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of `steps` windows, and the program's part of those of the bias.

    A token takes part in one window with each of its channels: no two programs write one number.
    """
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < dim
    program = row * tl.num_programs(0) + tl.program_id(0)
    for part in tl.static_range(PARTS):
        for step in range(0, length, TOKENS):
            offset = step + tl.arange(0, TOKENS)
            along = tl.zeros([TOKENS, CHANNELS], tl.float32)
            for window in range(steps):
                slot = tl.program_id(0) * steps + window
                is_slot = slot < slots
                entry = row * slots + tl.where(is_slot, slot, 0)
                filled = (tl.load(is_filled + entry) != 0) & is_slot
                first = tl.where(filled, tl.load(start + entry), 0)
                is_part = filled
                begin = first
                if part == 0 and PARTS == 2:
                    is_part = filled & (tl.load(position + row * tokens + first) > 0)
                    begin = first - length
                value, gate, is_in = compress_gate_tile(
                    values, gates, bias, row, begin, offset, channel, tokens, PARTS * dim, length, part,
                    dim, is_part, values_row, values_token, gates_row, gates_token,
                )  # fmt: skip
                seen = is_channel & filled
                total = tl.load(lse + entry * dim + channel, mask=seen, other=0.0)
                mean = tl.load(out + entry * dim + channel, mask=seen, other=0.0).to(tl.float32)
                g = tl.load(grad + entry * dim + channel, mask=seen, other=0.0).to(tl.float32)
                into_value = tl.exp(gate - total[None, :]) * g[None, :]
                into_gate = into_value * (value - mean[None, :])
                along += into_gate
                target = (row * tokens + begin) * PARTS * dim + part * dim
                target += offset[:, None] * (PARTS * dim) + channel[None, :]
                kind = grad_values.dtype.element_ty
                tl.store(grad_values + target, into_value.to(kind), mask=is_in)
                tl.store(grad_gates + target, into_gate.to(kind), mask=is_in)
            target = partial + program * length * PARTS * dim + part * dim
            target += offset[:, None] * (PARTS * dim) + channel[None, :]
            tl.store(target, along, mask=(offset < length)[:, None] & is_channel[None, :])


class GatedCompressTriton(torch.autograd.Function):
    """values, gates [B T E], bias [C E] -> entries [B N K]; keeps inputs, entries and log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        gates: Tensor,
        bias: Tensor,
        position: Tensor,
        windows: Windows,
        parts: int,
        tiles: Tiles,
    ) -> Tensor:
        """One launch."""
        rows, tokens, width = values.shape
        slots, length, dim = windows.start.shape[1], windows.length, width // parts
        out = torch.empty(rows, slots, dim, dtype=values.dtype, device=values.device)
        lse = torch.empty(rows, slots, dim, dtype=torch.float32, device=values.device)
        compress_gated_forward[(slots, rows, triton.cdiv(dim, tiles.channels))](
            values, gates, bias, windows.start, windows.is_filled, position, out, lse, tokens, slots,
            length, dim, *values.stride()[:2], *gates.stride()[:2], PARTS=parts, TOKENS=tiles.tokens,
            CHANNELS=tiles.channels, num_warps=tiles.warps,
        )  # fmt: skip
        ctx.save_for_backward(values, gates, bias, position, windows.start, windows.is_filled, out, lse)
        ctx.form = (length, parts, tiles)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch, and a sum of the programs' parts."""
        values, gates, bias, position, start, is_filled, out, lse = ctx.saved_tensors
        length, parts, tiles = ctx.form
        rows, tokens, width = values.shape
        slots, dim = start.shape[1], width // parts
        # Tokens in no window get nothing.
        grad_values, grad_gates = (
            torch.zeros(values.shape, dtype=x.dtype, device=values.device) for x in (values, gates)
        )
        programs = triton.cdiv(slots, tiles.windows)
        partial = torch.empty(rows * programs, length, width, dtype=torch.float32, device=values.device)
        compress_gated_backward[(programs, rows, triton.cdiv(dim, tiles.channels))](
            values, gates, bias, start, is_filled, position, out, lse, grads[0].contiguous(), grad_values,
            grad_gates, partial, tokens, slots, length, dim, tiles.windows, *values.stride()[:2],
            *gates.stride()[:2], PARTS=parts, TOKENS=tiles.tokens, CHANNELS=tiles.channels,
            num_warps=tiles.warps,
        )  # fmt: skip
        return grad_values, grad_gates, partial.sum(0).to(bias.dtype), None, None, None, None


def _placed(windows: Windows, x: Tensor) -> Windows:
    for name, part in (("windows.start", windows.start), ("windows.is_filled", windows.is_filled)):
        require(part.device == x.device, name, f"on {x.device}", part.device)
    return windows._replace(start=windows.start.contiguous(), is_filled=windows.is_filled.contiguous())


def _gathered(
    x: Tensor, place: Tensor | None, windows: Windows, *, is_mean: bool, tiles: Tiles | None
) -> Tensor:
    dim = triton.next_power_of_2(x.shape[3])
    tiles = tiles or Tiles(min(triton.next_power_of_2(windows.length), max(1, 4096 // dim)), dim, 1, 4)
    x = x if x.stride(3) == 1 else x.contiguous()
    place = None if place is None else place.contiguous()
    return cast(Tensor, GatherWindows.apply(x, place, _placed(windows, x), is_mean, tiles))


def mean_compress_triton(
    x: Float[Tensor, "B T G K"], windows: Windows, *, tiles: Tiles | None = None
) -> Float[Tensor, "B N G K"]:
    """`kernels.compress.mean_compress`; zero in slots without a window."""
    if windows.start.shape[1] == 0:
        return x[:, :0]
    return _gathered(x, None, windows, is_mean=True, tiles=tiles)


def mlp_compress_triton(
    x: Float[Tensor, "B T G K"],
    place: Float[Tensor, "G L K"],
    first: Float[Tensor, "G F E"],
    second: Float[Tensor, "G K F"],
    windows: Windows,
    *,
    tiles: Tiles | None = None,
) -> Float[Tensor, "B N G K"]:
    """`kernels.compress.mlp_compress`; zero in slots without a window. The products are the library's."""
    rows, slots = windows.start.shape
    if slots == 0:
        return x[:, :0]
    taken = _gathered(x, place, windows, is_mean=False, tiles=tiles).view(x.shape[2], rows * slots, -1)
    inner = silu(torch.bmm(taken, first.mT))
    return torch.bmm(inner, second.mT).view(-1, rows, slots, second.shape[1]).permute(1, 2, 0, 3)


def gated_compress_triton(
    values: Float[Tensor, "B T E"],
    gates: Float[Tensor, "B T E"],
    bias: Float[Tensor, "C E"],
    windows: Windows,
    *,
    position: Int[Tensor, "B T"],
    is_overlapping: bool,
    tiles: Tiles | None = None,
) -> Float[Tensor, "B N K"]:
    """`kernels.compress.gated_compress`; zero in slots without a window."""
    parts = 1 + is_overlapping
    dim = values.shape[2] // parts
    if windows.start.shape[1] == 0:
        return values[:, :0, :dim]
    channels = min(128, triton.next_power_of_2(dim))
    tiles = tiles or Tiles(min(32, triton.next_power_of_2(windows.length)), channels, 16, 4)
    values, gates = (x if x.stride(2) == 1 else x.contiguous() for x in (values, gates))
    out = GatedCompressTriton.apply(
        values, gates, bias.contiguous(), position.contiguous(), _placed(windows, values), parts, tiles
    )
    return cast(Tensor, out)
