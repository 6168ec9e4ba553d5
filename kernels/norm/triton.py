"""Root-mean-square norms in Triton: one program normalises some rows at a time.

Letters: N rows, D width. Rows come in blocks of `inner`, as the heads of a token do: row r lies at
(r // inner) * outer stride + (r % inner) * inner stride, so that a part of a wider projection needs no copy.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.arguments import require
from kernels.norm.reference import Gate

MAX_WIDTH = 65536
# Programs of the backward pass, each with partial sums for the weight: a few for each of 132 cores.
PARTIALS = 528


class Tiles(NamedTuple):
    """Rows that a program takes at a time, and its warps."""

    rows: int
    warps: int


class NormOptions(NamedTuple):
    """What the norm multiplies with; gate is 0 for none, 1 for SiLU, 2 for sigmoid."""

    eps: float
    factor: float = 1.0
    offset: float = 0.0
    gate: int = 0
    gates_first: bool = False


def tiles_for(width: int) -> Tiles:
    """Tiles that keep about 4,096 numbers of a row block in registers."""
    block = triton.next_power_of_2(width)
    return Tiles(max(1, 4096 // block), min(16, max(4, block // 1024)))


@triton.jit
def norm_gate(gate, KIND: tl.constexpr):
    """The activated gate and its slope."""
    share = tl.sigmoid(gate)
    if KIND == 1:
        return gate * share, share * (1.0 + gate * (1.0 - share))
    return share, share * (1.0 - share)


@triton.jit
def norm_forward(
    x,
    gate,
    weight,
    out,
    scale,
    rows,
    width,
    inner,
    x_outer,
    x_inner,
    gate_outer,
    gate_inner,
    weight_inner,
    eps,
    factor,
    offset,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATES_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS rows: normed rows, and the scale of each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_in = (row < rows)[:, None] & (column < width)[None, :]
    offs = (row // inner * x_outer + row % inner * x_inner)[:, None] + column[None, :]
    wide = tl.load(x + offs, mask=is_in, other=0.0).to(tl.float32)
    if GATE:
        offs = (row // inner * gate_outer + row % inner * gate_inner)[:, None] + column[None, :]
        active, _ = norm_gate(tl.load(gate + offs, mask=is_in, other=0.0).to(tl.float32), GATE)
        if GATES_FIRST:
            wide = wide * active
    size = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    normed = wide * (size * factor)[:, None]
    if HAS_WEIGHT:
        offs = (row % inner * weight_inner)[:, None] + column[None, :]
        normed = normed * (tl.load(weight + offs, mask=is_in, other=0.0).to(tl.float32) + offset)
    if GATE and not GATES_FIRST:
        normed = normed * active
    tl.store(out + row[:, None] * width + column[None, :], normed.to(out.dtype.element_ty), mask=is_in)
    tl.store(scale + row, size, mask=row < rows)


@triton.jit
def norm_backward(
    x,
    gate,
    weight,
    scale,
    grad,
    grad_x,
    grad_gate,
    partial,
    rows,
    width,
    inner,
    steps,
    x_outer,
    x_inner,
    gate_outer,
    gate_inner,
    factor,
    offset,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GATES_FIRST: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of `steps` blocks of rows, and the program's part of that of the weight.

    With BY_ROW each row of a block of `inner` has its own weight: then program p takes the rows p % inner.
    """
    column = tl.arange(0, WIDTH)
    program = tl.program_id(0).to(tl.int64)
    own = program % inner if BY_ROW else 0
    is_column = column < width
    if HAS_WEIGHT:
        w = tl.load(weight + own * width + column, mask=is_column, other=0.0).to(tl.float32) + offset
    total = tl.zeros([WIDTH], tl.float32)
    for step in range(steps):
        if BY_ROW:
            row = (((program // inner) * steps + step) * ROWS + tl.arange(0, ROWS)) * inner + own
        else:
            row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        is_in = (row < rows)[:, None] & is_column[None, :]
        offs = (row // inner * x_outer + row % inner * x_inner)[:, None] + column[None, :]
        raw = tl.load(x + offs, mask=is_in, other=0.0).to(tl.float32)
        flat = row[:, None] * width + column[None, :]
        g = tl.load(grad + flat, mask=is_in, other=0.0).to(tl.float32)
        size = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        wide = raw
        if GATE:
            offs = (row // inner * gate_outer + row % inner * gate_inner)[:, None] + column[None, :]
            active, slope = norm_gate(tl.load(gate + offs, mask=is_in, other=0.0).to(tl.float32), GATE)
            if GATES_FIRST:
                wide = raw * active
        normed = wide * size
        scaled = normed * factor
        if GATE and not GATES_FIRST:
            behind = scaled * w[None, :] if HAS_WEIGHT else scaled
            tl.store(grad_gate + flat, (g * behind * slope).to(grad_gate.dtype.element_ty), mask=is_in)
            g = g * active
        if HAS_WEIGHT:
            total += tl.sum(g * scaled, axis=0)
            g = g * w[None, :]
        # y = x s with s = (mean x^2 + eps)^(-1/2): dx = s g - x s^3 mean(g x)
        g = g * factor
        pull = tl.sum(g * normed, axis=1)[:, None] / width
        into = (g - normed * pull) * size
        if GATE and GATES_FIRST:
            tl.store(grad_gate + flat, (into * raw * slope).to(grad_gate.dtype.element_ty), mask=is_in)
            into = into * active
        tl.store(grad_x + flat, into.to(grad_x.dtype.element_ty), mask=is_in)
    if HAS_WEIGHT:
        tl.store(partial + program * width + column, total, mask=is_column)


class RmsNormTriton(torch.autograd.Function):
    """x and gate [M I D], weight [D] or [I D] or None -> [M I D]; keeps its inputs and a number per row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor | None, form: NormOptions, tiles: Tiles
    ) -> Tensor:
        """One launch."""
        blocks, inner, width = x.shape
        out = torch.empty(x.shape, dtype=(x if gate is None else gate).dtype, device=x.device)
        scale = torch.empty(blocks * inner, dtype=torch.float32, device=x.device)
        by_row = weight is not None and weight.ndim == 2 and weight.shape[0] > 1
        norm_forward[(triton.cdiv(blocks * inner, tiles.rows),)](
            x,
            gate,
            weight,
            out,
            scale,
            blocks * inner,
            width,
            inner,
            *_strides(x),
            *_strides(gate),
            width if by_row else 0,
            form.eps,
            form.factor,
            form.offset,
            HAS_WEIGHT=weight is not None,
            GATE=form.gate,
            GATES_FIRST=form.gates_first,
            ROWS=tiles.rows,
            WIDTH=triton.next_power_of_2(width),
            num_warps=tiles.warps,
        )
        ctx.save_for_backward(x, gate, weight, scale)
        ctx.form, ctx.tiles, ctx.by_row = form, tiles, by_row
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch, and a sum of the programs' parts."""
        x, gate, weight, scale = ctx.saved_tensors
        blocks, inner, width = x.shape
        form, tiles = ctx.form, ctx.tiles
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_gate = None if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
        groups = inner if ctx.by_row else 1
        rows = blocks * inner // groups
        programs = min(max(1, PARTIALS // groups), triton.cdiv(rows, tiles.rows))
        steps = triton.cdiv(rows, tiles.rows * programs)
        partial = torch.empty(programs, groups, width, dtype=torch.float32, device=x.device)
        norm_backward[(programs * groups,)](
            x,
            gate,
            weight,
            scale,
            grads[0].contiguous(),
            grad_x,
            grad_gate,
            partial,
            blocks * inner,
            width,
            inner,
            steps,
            *_strides(x),
            *_strides(gate),
            form.factor,
            form.offset,
            HAS_WEIGHT=weight is not None,
            GATE=form.gate,
            GATES_FIRST=form.gates_first,
            BY_ROW=ctx.by_row,
            ROWS=tiles.rows,
            WIDTH=triton.next_power_of_2(width),
            num_warps=tiles.warps,
        )
        grad_weight = None if weight is None else partial.sum(0).view_as(weight).to(weight.dtype)
        return grad_x, grad_gate, grad_weight, None, None


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _blocks(x: Float[Tensor, "*N D"]) -> Float[Tensor, "M I D"]:
    """x as blocks of rows without a copy where the leading dims are one step each; last stride 1."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    x = x[None] if x.ndim == 1 else x
    x = x[None] if x.ndim == 2 else x
    steps = zip(x.shape[1:-2], x.stride()[:-3], x.stride()[1:-2], strict=True)
    return (x if all(far == size * near for size, far, near in steps) else x.contiguous()).flatten(0, -3)


def _apply(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, form: NormOptions, tiles: Tiles | None
) -> Tensor:
    width = x.shape[-1]
    require(0 < width <= MAX_WIDTH, "x", f"1 to {MAX_WIDTH} columns", width)
    require(x.numel() > 0, "x", "at least one row", tuple(x.shape))
    for name, other in (("gate", gate), ("weight", weight)):
        require(other is None or other.device == x.device, name, f"on {x.device}", other)
    gate = None if gate is None else _blocks(gate)
    weight = None if weight is None else weight.contiguous()
    out = RmsNormTriton.apply(_blocks(x), gate, weight, form, tiles or tiles_for(width))
    return cast(Tensor, out).view(x.shape)


def rms_norm_triton(
    x: Float[Tensor, "*N D"],
    weight: Float[Tensor, "D"],
    eps: float,
    *,
    is_zero_centered: bool = False,
    tiles: Tiles | None = None,
) -> Float[Tensor, "*N D"]:
    """`kernels.norm.rms_norm`. Raises ValueError for no rows or a width above MAX_WIDTH."""
    return _apply(x, None, weight, NormOptions(eps, offset=float(is_zero_centered)), tiles)


def gated_rms_norm_triton(
    x: Float[Tensor, "*N D"],
    gate: Float[Tensor, "*N D"],
    weight: Float[Tensor, "#R D"],
    eps: float,
    *,
    kind: Gate,
    gates_first: bool = False,
    tiles: Tiles | None = None,
) -> Float[Tensor, "*N D"]:
    """`kernels.norm.gated_rms_norm`. Raises ValueError as `rms_norm_triton`."""
    form = NormOptions(eps, gate=1 if kind == "silu" else 2, gates_first=gates_first)
    return _apply(x, gate, weight, form, tiles)


def unit_norm_triton(
    x: Float[Tensor, "*N D"], *, factor: float = 1.0, eps: float = 1e-6, tiles: Tiles | None = None
) -> Float[Tensor, "*N D"]:
    """`kernels.norm.unit_norm`. Raises ValueError as `rms_norm_triton`."""
    width = x.shape[-1]
    # The length is the root of the mean square times the root of the width.
    return _apply(
        x, None, None, NormOptions(eps / max(1, width), factor=factor * max(1, width) ** -0.5), tiles
    )
