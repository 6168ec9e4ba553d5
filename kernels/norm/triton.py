"""Root-mean-square norm in Triton: one program normalises some rows at a time.

Letters: N rows, D width.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.arguments import require

MAX_WIDTH = 65536
# Programs of the backward pass, each with partial sums for the weight: a few for each of 132 cores.
PARTIALS = 528


class Tiles(NamedTuple):
    """Rows that a program takes at a time, and its warps."""

    rows: int
    warps: int


def tiles_for(width: int) -> Tiles:
    """Tiles that keep about 4,096 numbers of a row block in registers."""
    block = triton.next_power_of_2(width)
    return Tiles(max(1, 4096 // block), min(16, max(4, block // 1024)))


@triton.jit
def norm_forward(x, weight, out, scale, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS rows: normed rows, and the factor of each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_in = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    wide = tl.load(x + place, mask=is_in, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    normed = wide * factor[:, None] * w[None, :]
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=is_in)
    tl.store(scale + row, factor, mask=row < rows)


@triton.jit
def norm_backward(
    x, weight, scale, grad, grad_x, partial, rows, width, steps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """`steps` blocks of ROWS rows: gradients of x, and this program's part of that of the weight."""
    # y = x s w with s = (mean x^2 + eps)^(-1/2): dx = s (g w) - x s^3 mean(g w x)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS
    column = tl.arange(0, WIDTH)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)
        is_in = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        wide = tl.load(x + place, mask=is_in, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=is_in, other=0.0).to(tl.float32)
        factor = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        normed = wide * factor
        total += tl.sum(g * normed, axis=0)
        g = g * w[None, :]
        pull = tl.sum(g * normed, axis=1)[:, None] / width
        tl.store(grad_x + place, ((g - normed * pull) * factor).to(grad_x.dtype.element_ty), mask=is_in)
    tl.store(partial + tl.program_id(0) * width + column, total, mask=column < width)


class RmsNormTriton(torch.autograd.Function):
    """x [N D] contiguous, weight [D] -> [N D]; keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, tiles: Tiles) -> Tensor:
        """One launch."""
        rows, width = x.shape
        out, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        grid = (triton.cdiv(rows, tiles.rows),)
        norm_forward[grid](
            x, weight, out, scale, rows, width, eps, ROWS=tiles.rows, WIDTH=block, num_warps=tiles.warps
        )
        ctx.save_for_backward(x, weight, scale)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch, and a sum of the programs' parts."""
        x, weight, scale = ctx.saved_tensors
        rows, width = x.shape
        tiles = ctx.tiles
        grad_x = torch.empty_like(x)
        programs = min(PARTIALS, triton.cdiv(rows, tiles.rows))
        steps = triton.cdiv(rows, tiles.rows * programs)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        inputs = (x, weight, scale, grads[0].contiguous(), grad_x, partial, rows, width, steps)
        norm_backward[(programs,)](*inputs, ROWS=tiles.rows, WIDTH=block, num_warps=tiles.warps)
        return grad_x, partial.sum(0).to(weight.dtype), None, None


def rms_norm_triton(
    x: Float[Tensor, "*N D"], weight: Float[Tensor, "D"], eps: float, *, tiles: Tiles | None = None
) -> Float[Tensor, "*N D"]:
    """`kernels.norm.rms_norm` in Triton. Raises ValueError for a width above MAX_WIDTH."""
    width = x.shape[-1]
    require(width <= MAX_WIDTH, "x", f"at most {MAX_WIDTH} columns", width)
    if x.numel() == 0:
        return x * weight.sum().to(x.dtype)
    flat = x.reshape(-1, width)
    out = RmsNormTriton.apply(flat.contiguous(), weight.contiguous(), eps, tiles or tiles_for(width))
    return cast(Tensor, out).view(x.shape)
