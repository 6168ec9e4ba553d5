"""Rotary positions in Triton: one program turns some heads of some tokens; turning back is the gradient.

Letters: B rows, T tokens, H heads, K head dim, R angles.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.arguments import require
from kernels.rotary.reference import RotaryLayout


class Tiles(NamedTuple):
    """Heads of all tokens that a program turns, and its warps."""

    lines: int
    warps: int


@triton.jit
def rotary_turn(
    x,
    cos,
    sin,
    out,
    lines,
    tokens,
    heads,
    dim,
    angles,
    first,
    sign,
    x_row,
    x_token,
    x_head,
    table_row,
    IS_SPLIT: tl.constexpr,
    LINES: tl.constexpr,
    ANGLES: tl.constexpr,
    REST: tl.constexpr,
):
    """LINES lines of K dims: pairs from dim `first` on turned, the REST copied."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    is_line = line < lines
    token = line // heads
    source = token // tokens * x_row + token % tokens * x_token + line % heads * x_head
    target = line * dim
    angle = tl.arange(0, ANGLES)
    is_in = is_line[:, None] & (angle < angles)[None, :]
    table_offs = (token // tokens * table_row + token % tokens * angles)[:, None] + angle[None, :]
    c = tl.load(cos + table_offs, mask=is_in, other=0.0).to(tl.float32)
    s = tl.load(sin + table_offs, mask=is_in, other=0.0).to(tl.float32) * sign
    if IS_SPLIT:
        near, far = first + angle, first + angles + angle
    else:
        near, far = first + 2 * angle, first + 2 * angle + 1
    a = tl.load(x + source[:, None] + near[None, :], mask=is_in, other=0.0).to(tl.float32)
    b = tl.load(x + source[:, None] + far[None, :], mask=is_in, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + target[:, None] + near[None, :], (a * c - b * s).to(kind), mask=is_in)
    tl.store(out + target[:, None] + far[None, :], (b * c + a * s).to(kind), mask=is_in)
    if REST:
        # The dims before the turned ones, or those behind them.
        rest = tl.arange(0, REST)
        is_in = is_line[:, None] & (rest < dim - 2 * angles)[None, :]
        rest = tl.where(first > 0, rest, rest + 2 * angles)
        kept = tl.load(x + source[:, None] + rest[None, :], mask=is_in, other=0.0)
        tl.store(out + target[:, None] + rest[None, :], kept, mask=is_in)


class RotateTriton(torch.autograd.Function):
    """x [B T H K] -> [B T H K]; keeps only the tables."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, is_split: bool, on_last: bool, tiles: Tiles
    ) -> Tensor:
        """One launch."""
        ctx.save_for_backward(cos, sin)
        ctx.form = (is_split, on_last, tiles)
        return _launch(x, cos, sin, 1.0, is_split, on_last, tiles)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch with the angles reversed."""
        return _launch(grads[0], *ctx.saved_tensors, -1.0, *ctx.form), None, None, None, None, None


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, sign: float, is_split: bool, on_last: bool, tiles: Tiles
) -> Tensor:
    rows, tokens, heads, dim = x.shape
    x = x if x.stride(-1) == 1 or dim == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    angles, lines = cos.shape[-1], rows * tokens * heads
    rest = dim - 2 * angles
    rotary_turn[(triton.cdiv(lines, tiles.lines),)](
        x,
        cos,
        sin,
        out,
        lines,
        tokens,
        heads,
        dim,
        angles,
        rest if on_last else 0,
        sign,
        *x.stride()[:3],
        0 if cos.shape[0] == 1 else tokens * angles,
        IS_SPLIT=is_split,
        LINES=tiles.lines,
        ANGLES=triton.next_power_of_2(angles),
        REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=tiles.warps,
    )
    return out


def rotate_triton(
    x: Float[Tensor, "B T H K"],
    cos: Float[Tensor, "#B T R"],
    sin: Float[Tensor, "#B T R"],
    layout: RotaryLayout,
    *,
    on_last: bool,
    tiles: Tiles | None = None,
) -> Float[Tensor, "B T H K"]:
    """`kernels.rotary.rotate`. Raises ValueError for no tokens, or tables elsewhere than x."""
    require(x.numel() > 0 and cos.numel() > 0, "x", "at least one token and angle", tuple(x.shape))
    require(cos.device == sin.device == x.device, "cos, sin", f"on {x.device}", (cos.device, sin.device))
    tiles = tiles or Tiles(max(1, 2048 // triton.next_power_of_2(x.shape[-1])), 4)
    is_split = layout == "half_split"
    return cast(Tensor, RotateTriton.apply(x, cos.contiguous(), sin.contiguous(), is_split, on_last, tiles))
