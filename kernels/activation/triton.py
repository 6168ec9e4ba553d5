"""Activations of feed-forwards in Triton. Letters: N rows, F hidden; gate columns first, then up columns."""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.activation.reference import Kind, is_gated
from kernels.arguments import require

KINDS: dict[Kind, int] = {"swiglu": 0, "geglu": 1, "shifted_swiglu": 2, "relu2": 3}
SHIFTED_SLOPE = tl.constexpr(1.702)
# GELU in its tanh form: gate sigmoid(2 u), u = sqrt(2 / pi) (gate + 0.044715 gate^3).
GELU_SLOPE = tl.constexpr(1.5957691216057308)
GELU_CUBE = tl.constexpr(0.044715)


class Tiles(NamedTuple):
    """Rows and columns that a program takes, and its warps."""

    rows: int
    columns: int
    warps: int


@triton.jit
def activation_factors(gate, up, limit, KIND: tl.constexpr, CLAMP: tl.constexpr):
    """The two factors of a gated activation, and what each changes by with the gate and the up.

    CLAMP: 0 none, 1 before the activation, 2 the factors after it.
    """
    gate_open, up_open = gate == gate, up == up
    if CLAMP == 1:
        gate_open, up_open = gate <= limit, (up >= -limit) & (up <= limit)
        gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
    if KIND == 1:
        inner = GELU_SLOPE * (gate + GELU_CUBE * gate * gate * gate)
        share = tl.sigmoid(inner)
        slope = share + gate * share * (1.0 - share) * GELU_SLOPE * (1.0 + 3.0 * GELU_CUBE * gate * gate)
    elif KIND == 2:
        share = tl.sigmoid(SHIFTED_SLOPE * gate)
        slope = share + gate * share * (1.0 - share) * SHIFTED_SLOPE
    else:
        share = tl.sigmoid(gate)
        slope = share + gate * share * (1.0 - share)
    active = gate * share
    if KIND == 2:
        up = up + 1.0
    if CLAMP == 2:
        gate_open, up_open = active <= limit, (up >= -limit) & (up <= limit)
        active, up = tl.minimum(active, limit), tl.minimum(tl.maximum(up, -limit), limit)
    return active, up, tl.where(gate_open, slope, 0.0), tl.where(up_open, 1.0, 0.0)


@triton.jit
def activation_forward(
    hidden,
    out,
    rows,
    columns,
    row_stride,
    limit,
    KIND: tl.constexpr,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of the activation."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_in = (row < rows) & (column < columns)
    gate = tl.load(hidden + row * row_stride + column, mask=is_in, other=0.0).to(tl.float32)
    if KIND == 3:
        active = tl.maximum(gate, 0.0)
        result = active * active
    else:
        up = tl.load(hidden + row * row_stride + columns + column, mask=is_in, other=0.0).to(tl.float32)
        active, other, _, _ = activation_factors(gate, up, limit, KIND, CLAMP)
        result = active * other
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def activation_backward(
    hidden,
    grad,
    grad_hidden,
    rows,
    columns,
    row_stride,
    limit,
    KIND: tl.constexpr,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of the gradients of gates and ups."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_in = (row < rows) & (column < columns)
    g = tl.load(grad + row * columns + column, mask=is_in, other=0.0).to(tl.float32)
    gate = tl.load(hidden + row * row_stride + column, mask=is_in, other=0.0).to(tl.float32)
    kind = grad_hidden.dtype.element_ty
    if KIND == 3:
        into = 2.0 * tl.maximum(gate, 0.0) * g
        tl.store(grad_hidden + row * columns + column, into.to(kind), mask=is_in)
    else:
        up = tl.load(hidden + row * row_stride + columns + column, mask=is_in, other=0.0).to(tl.float32)
        active, other, slope, is_open = activation_factors(gate, up, limit, KIND, CLAMP)
        row_ptrs = grad_hidden + row * 2 * columns + column
        tl.store(row_ptrs, (g * other * slope).to(kind), mask=is_in)
        tl.store(row_ptrs + columns, (g * active * is_open).to(kind), mask=is_in)


class ActivateTriton(torch.autograd.Function):
    """hidden [N 2F], or [N F] without gate -> [N F]; keeps its input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, kind: int, clamp: int, limit: float, tiles: Tiles) -> Tensor:
        """One launch."""
        columns = hidden.shape[1] // (1 if kind == KINDS["relu2"] else 2)
        out = torch.empty(hidden.shape[0], columns, dtype=hidden.dtype, device=hidden.device)
        ctx.save_for_backward(hidden)
        ctx.form = (kind, clamp, limit, tiles)
        activation_forward[_grid(out, tiles)](
            hidden,
            out,
            *out.shape,
            hidden.stride(0),
            limit,
            KIND=kind,
            CLAMP=clamp,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            num_warps=tiles.warps,
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch."""
        (hidden,) = ctx.saved_tensors
        kind, clamp, limit, tiles = ctx.form
        grad = grads[0].contiguous()
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        activation_backward[_grid(grad, tiles)](
            hidden,
            grad,
            grad_hidden,
            *grad.shape,
            hidden.stride(0),
            limit,
            KIND=kind,
            CLAMP=clamp,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            num_warps=tiles.warps,
        )
        return grad_hidden, None, None, None, None


def _grid(out: Tensor, tiles: Tiles) -> tuple[int, int]:
    return triton.cdiv(out.shape[0], tiles.rows), triton.cdiv(out.shape[1], tiles.columns)


def activate_triton(
    hidden: Float[Tensor, "*N F2"],
    kind: Kind,
    *,
    limit: float | None = None,
    clamps_product: bool = False,
    tiles: Tiles | None = None,
) -> Float[Tensor, "*N F"]:
    """`kernels.activation.activate`. Raises ValueError for no rows or columns."""
    require(hidden.numel() > 0, "hidden", "at least one number", tuple(hidden.shape))
    flat = hidden.reshape(-1, hidden.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    clamp = 0 if limit is None else 1 + clamps_product
    tiles = tiles or Tiles(4, 1024, 4)
    out = ActivateTriton.apply(flat, KINDS[kind], clamp, 0.0 if limit is None else limit, tiles)
    columns = hidden.shape[-1] // (2 if is_gated(kind) else 1)
    return cast(Tensor, out).view(*hidden.shape[:-1], columns)
