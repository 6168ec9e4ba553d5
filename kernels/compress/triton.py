"""Compressors in Triton: windows gathered, and a softmax over the tokens of a window for each channel.

Letters: B rows, T tokens, N slots of windows, G heads, K dim of an entry, L or C tokens of a window, E
channels. Slots without a window come out as zero, and give no gradient. x_row, x_token, x_head: strides of x.

The softmax is online, in the names of FlashAttention-2 (arXiv 2307.08691, algorithm 1, lines 9 to 13): m_i,
m_new, l_i, alpha, acc; backward takes p = exp(gate - lse) and dgate = p (dp - delta) with delta = do o.
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
    """Tokens and channels of a tile, windows that a program takes, and its warps."""

    tokens: int
    channels: int
    windows: int
    warps: int


@triton.jit
def compress_gather(
    x, position_encoding, start, is_filled, out, tokens, slots, length, heads, dim, x_row, x_token, x_head,
    HAS_POSITION_ENCODING: tl.constexpr, MEAN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One window of one head: its tokens plus position_encoding, [G B N L K], or their mean, [B N G K]."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.program_id(0)
    entry = row * slots + slot
    first = tl.load(start + entry)
    filled = tl.load(is_filled + entry)
    channel = tl.arange(0, CHANNELS)
    token = tl.arange(0, TOKENS)
    acc = tl.zeros([CHANNELS], tl.float32)
    for begin in range(0, length, TOKENS):
        offset = begin + token
        is_in = (offset < length)[:, None] & (channel < dim)[None, :]
        x_ptrs = x + row * x_row + first * x_token + head * x_head
        x_ptrs += offset[:, None] * x_token + channel[None, :]
        value = tl.load(x_ptrs, mask=is_in & filled, other=0.0).to(tl.float32)
        if HAS_POSITION_ENCODING:
            encoding_ptrs = position_encoding + (head * length + offset)[:, None] * dim + channel[None, :]
            value += tl.load(encoding_ptrs, mask=is_in & filled, other=0.0).to(tl.float32)
        if MEAN:
            acc += tl.sum(value, axis=0)
        else:
            window_row = (head * tl.num_programs(1) * slots + entry) * length
            out_ptrs = out + (window_row + offset)[:, None] * dim + channel[None, :]
            tl.store(out_ptrs, value.to(out.dtype.element_ty), mask=is_in)
    if MEAN:
        out_ptrs = out + (entry * heads + head) * dim + channel
        tl.store(out_ptrs, (acc / length).to(out.dtype.element_ty), mask=channel < dim)


@triton.jit
def compress_scatter(
    dy, start, is_filled, dx, tokens, slots, length, stride, heads, dim, candidates,
    MEAN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The adjoint of `compress_gather`: for tokens of one head the sum over the windows that hold them."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    is_in = (token < tokens)[:, None] & (channel < dim)[None, :]
    acc = tl.zeros([TOKENS, CHANNELS], tl.float32)
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
            dy_ptrs = dy + ((entry * heads + head) * dim)[:, None] + channel[None, :]
        else:
            window_row = (head * tl.num_programs(1) * slots + entry) * length + offset
            dy_ptrs = dy + window_row[:, None] * dim + channel[None, :]
        value = tl.load(dy_ptrs, mask=is_covered[:, None] & is_in, other=0.0).to(tl.float32)
        acc += value / length if MEAN else value
    dx_ptrs = dx + ((row * tokens + token) * heads + head)[:, None] * dim + channel[None, :]
    tl.store(dx_ptrs, acc.to(dx.dtype.element_ty), mask=is_in)


class GatherWindows(torch.autograd.Function):
    """x [B T G K], position_encoding [G L K] or None -> tokens of windows [G B N L K], or means [B N G K]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, position_encoding: Tensor | None, windows: Windows, is_mean: bool, tiles: Tiles
    ) -> Tensor:
        """One launch."""
        rows, tokens, heads, dim = x.shape
        slots, length = windows.start.shape[1], windows.length
        shape = (rows, slots, heads, dim) if is_mean else (heads, rows, slots, length, dim)
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        compress_gather[(slots, rows, heads)](
            x, position_encoding, windows.start, windows.is_filled, out, tokens, slots, length, heads, dim,
            *x.stride()[:3], HAS_POSITION_ENCODING=position_encoding is not None, MEAN=is_mean,
            TOKENS=tiles.tokens, CHANNELS=triton.next_power_of_2(dim), num_warps=tiles.warps,
        )  # fmt: skip
        ctx.save_for_backward(windows.start, windows.is_filled)
        ctx.form = (x.shape, x.dtype, windows.length, windows.stride, is_mean, tiles)
        ctx.encoding_dtype = None if position_encoding is None else position_encoding.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch, and a sum over windows for position_encoding."""
        start, is_filled = ctx.saved_tensors
        shape, dtype, length, stride, is_mean, tiles = ctx.form
        rows, tokens, heads, dim = shape
        dy = grads[0].contiguous()
        dx = torch.empty(shape, dtype=dtype, device=dy.device)
        block = tiles.tokens
        candidates = triton.cdiv(length, stride) + 1
        compress_scatter[(triton.cdiv(tokens, block), rows, heads)](
            dy, start, is_filled, dx, tokens, start.shape[1], length, stride, heads, dim, candidates,
            MEAN=is_mean, TOKENS=block, CHANNELS=triton.next_power_of_2(dim), num_warps=tiles.warps,
        )  # fmt: skip
        dencoding = None
        if ctx.encoding_dtype is not None:
            dwindows = dy * is_filled[None, :, :, None, None]
            dencoding = dwindows.sum((1, 2), dtype=torch.float32).to(ctx.encoding_dtype)
        return dx, dencoding, None, None, None


@triton.jit
def compress_gate_tile(
    values, gates, bias, row, begin, offset, channel, tokens, width, length, part, dim, is_part,
    values_row, values_token, gates_row, gates_token,
):  # fmt: skip
    """Values, and gates + bias, of tokens begin + offset, in the part-th dim channels; -inf for no token."""
    is_in = (is_part & (offset < length))[:, None] & (channel < dim)[None, :]
    column = part * dim + channel
    base = values + row * values_row + begin * values_token
    value = tl.load(base + offset[:, None] * values_token + column[None, :], mask=is_in, other=0.0)
    base = gates + row * gates_row + begin * gates_token
    gate = tl.load(base + offset[:, None] * gates_token + column[None, :], mask=is_in, other=0.0)
    bias_tile = tl.load(bias + offset[:, None] * width + column[None, :], mask=is_in, other=0.0)
    gate = tl.where(is_in, gate.to(tl.float32) + bias_tile.to(tl.float32), float("-inf"))
    return value.to(tl.float32), gate, is_in


@triton.jit
def compress_gated_forward(
    values, gates, bias, start, is_filled, position, out, lse, tokens, slots, length, dim,
    values_row, values_token, gates_row, gates_token,
    PARTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One entry: an online softmax over its tokens; with 2 PARTS those of the window before go first."""
    row = tl.program_id(1).to(tl.int64)
    entry = row * slots + tl.program_id(0)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.load(start + entry)
    filled = tl.load(is_filled + entry) != 0
    first = tl.where(filled, first, 0)
    has_before = tl.load(position + row * tokens + first) > 0
    m_i = tl.full([CHANNELS], float("-inf"), tl.float32)
    l_i = tl.zeros([CHANNELS], tl.float32)
    acc = tl.zeros([CHANNELS], tl.float32)
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
            m_new = tl.maximum(m_i, tl.max(gate, axis=0))
            # Before any token m_new is minus infinity, which has no difference: zero does as well.
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp(gate - m_safe[None, :])
            alpha = tl.exp(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, axis=0)
            acc = acc * alpha + tl.sum(p * value, axis=0)
            m_i = m_new
    is_channel = channel < dim
    l_i = tl.where(l_i > 0, l_i, 1.0)
    entry_tile = tl.where(filled, acc / l_i, 0.0)
    tl.store(out + entry * dim + channel, entry_tile.to(out.dtype.element_ty), mask=is_channel)
    tl.store(lse + entry * dim + channel, m_i + tl.log(l_i), mask=is_channel & filled)


@triton.jit
def compress_gated_backward(
    values, gates, bias, start, is_filled, position, out, lse, do, dvalues, dgates, partial,
    tokens, slots, length, dim, steps, values_row, values_token, gates_row, gates_token,
    PARTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of `steps` windows, and the program's partial sum of those of the bias.

    Each channel of a token belongs to one window: no two programs write the same number.
    """
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < dim
    program = row * tl.num_programs(0) + tl.program_id(0)
    for part in tl.static_range(PARTS):
        for step in range(0, length, TOKENS):
            offset = step + tl.arange(0, TOKENS)
            dbias = tl.zeros([TOKENS, CHANNELS], tl.float32)
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
                is_seen = is_channel & filled
                lse_i = tl.load(lse + entry * dim + channel, mask=is_seen, other=0.0)
                o = tl.load(out + entry * dim + channel, mask=is_seen, other=0.0).to(tl.float32)
                do_i = tl.load(do + entry * dim + channel, mask=is_seen, other=0.0).to(tl.float32)
                dvalue = tl.exp(gate - lse_i[None, :]) * do_i[None, :]
                dgate = dvalue * (value - o[None, :])
                dbias += dgate
                token_offs = (row * tokens + begin) * PARTS * dim + part * dim
                token_offs += offset[:, None] * (PARTS * dim) + channel[None, :]
                dtype = dvalues.dtype.element_ty
                tl.store(dvalues + token_offs, dvalue.to(dtype), mask=is_in)
                tl.store(dgates + token_offs, dgate.to(dtype), mask=is_in)
            partial_ptrs = partial + program * length * PARTS * dim + part * dim
            partial_ptrs += offset[:, None] * (PARTS * dim) + channel[None, :]
            tl.store(partial_ptrs, dbias, mask=(offset < length)[:, None] & is_channel[None, :])


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
        """One launch, and the sum of its partial sums."""
        values, gates, bias, position, start, is_filled, out, lse = ctx.saved_tensors
        length, parts, tiles = ctx.form
        rows, tokens, width = values.shape
        slots, dim = start.shape[1], width // parts
        # Tokens in no window get nothing.
        dvalues, dgates = (
            torch.zeros(values.shape, dtype=x.dtype, device=values.device) for x in (values, gates)
        )
        programs = triton.cdiv(slots, tiles.windows)
        partial = torch.empty(rows * programs, length, width, dtype=torch.float32, device=values.device)
        compress_gated_backward[(programs, rows, triton.cdiv(dim, tiles.channels))](
            values, gates, bias, start, is_filled, position, out, lse, grads[0].contiguous(), dvalues,
            dgates, partial, tokens, slots, length, dim, tiles.windows, *values.stride()[:2],
            *gates.stride()[:2], PARTS=parts, TOKENS=tiles.tokens, CHANNELS=tiles.channels,
            num_warps=tiles.warps,
        )  # fmt: skip
        return dvalues, dgates, partial.sum(0).to(bias.dtype), None, None, None, None


def _on_device(windows: Windows, x: Tensor) -> Windows:
    for name, part in (("windows.start", windows.start), ("windows.is_filled", windows.is_filled)):
        require(part.device == x.device, name, f"on {x.device}", part.device)
    return windows._replace(start=windows.start.contiguous(), is_filled=windows.is_filled.contiguous())


def _gathered(
    x: Tensor, position_encoding: Tensor | None, windows: Windows, *, is_mean: bool, tiles: Tiles | None
) -> Tensor:
    dim = triton.next_power_of_2(x.shape[3])
    tiles = tiles or Tiles(min(triton.next_power_of_2(windows.length), max(1, 4096 // dim)), dim, 1, 4)
    x = x if x.stride(3) == 1 else x.contiguous()
    position_encoding = None if position_encoding is None else position_encoding.contiguous()
    return cast(Tensor, GatherWindows.apply(x, position_encoding, _on_device(windows, x), is_mean, tiles))


def mean_compress_triton(
    x: Float[Tensor, "B T G K"], windows: Windows, *, tiles: Tiles | None = None
) -> Float[Tensor, "B N G K"]:
    """`kernels.compress.mean_compress`; zero in slots without a window."""
    if windows.start.shape[1] == 0:
        return x[:, :0]
    return _gathered(x, None, windows, is_mean=True, tiles=tiles)


def mlp_compress_triton(
    x: Float[Tensor, "B T G K"],
    position_encoding: Float[Tensor, "G L K"],
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
    taken = _gathered(x, position_encoding, windows, is_mean=False, tiles=tiles).view(
        x.shape[2], rows * slots, -1
    )
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
        values, gates, bias.contiguous(), position.contiguous(), _on_device(windows, values), parts, tiles
    )
    return cast(Tensor, out)
