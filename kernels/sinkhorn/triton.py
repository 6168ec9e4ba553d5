"""Sinkhorn-Knopp in Triton: one program normalises many small matrices, which stay in registers.

Letters: N matrices, n streams.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.arguments import require

MAX_STREAMS = 16


class Tiles(NamedTuple):
    """Matrices of a program, and its warps."""

    matrices: int
    warps: int


@triton.jit
def sinkhorn_load(x, first, matrices, n, other, MATRICES: tl.constexpr, SIZE: tl.constexpr):
    """MATRICES matrices [SIZE SIZE MATRICES], rows first, `other` outside; and which numbers are inside."""
    row = tl.arange(0, SIZE)[:, None, None]
    column = tl.arange(0, SIZE)[None, :, None]
    matrix = first + tl.arange(0, MATRICES)[None, None, :].to(tl.int64)
    is_in = (row < n) & (column < n) & (matrix < matrices)
    offs = (matrix * n + row) * n + column
    return tl.load(x + offs, mask=is_in, other=other).to(tl.float32), offs, is_in


@triton.jit
def sinkhorn_softmax(logits, is_in):
    """The softmax over each row, zero outside."""
    shares = tl.where(is_in, tl.exp(logits - tl.max(logits, axis=1)[:, None, :]), 0.0)
    total = tl.sum(shares, axis=1)[:, None, :]
    return shares / tl.where(total > 0, total, 1.0)


@triton.jit
def sinkhorn_total(matrix, eps, IS_ROW: tl.constexpr):
    """The sums plus eps that the matrix is divided by."""
    if IS_ROW:
        total = tl.sum(matrix, axis=1)[:, None, :]
    else:
        total = tl.sum(matrix, axis=0)[None, :, :]
    return total + eps


@triton.jit
def sinkhorn_forward(logits, out, matrices, n, iterations, eps, MATRICES: tl.constexpr, SIZE: tl.constexpr):
    """Softmax over rows, then columns and rows in turn."""
    first = tl.program_id(0).to(tl.int64) * MATRICES
    x, offs, is_in = sinkhorn_load(logits, first, matrices, n, float("-inf"), MATRICES, SIZE)
    x = tl.where(is_in, x, -1e30)
    matrix = tl.where(is_in, sinkhorn_softmax(x, is_in) + eps, 0.0)
    matrix = matrix / sinkhorn_total(matrix, eps, False)
    for _ in range(iterations - 1):
        matrix = matrix / sinkhorn_total(matrix, eps, True)
        matrix = matrix / sinkhorn_total(matrix, eps, False)
    tl.store(out + offs, matrix.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def sinkhorn_undo(matrix, grad, total, IS_ROW: tl.constexpr):
    """The matrix before a division, and its gradient: of y = x / s it is (g - sum(g y)) / s."""
    along = sinkhorn_total(grad * matrix, 0.0, IS_ROW)
    return matrix * total, (grad - along) / total


@triton.jit
def sinkhorn_backward(
    logits,
    grad,
    grad_logits,
    totals,
    matrices,
    n,
    iterations,
    eps,
    MATRICES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The divisions made again, their totals kept in memory, and undone one by one."""
    first = tl.program_id(0).to(tl.int64) * MATRICES
    x, offs, is_in = sinkhorn_load(logits, first, matrices, n, float("-inf"), MATRICES, SIZE)
    x = tl.where(is_in, x, -1e30)
    shares = sinkhorn_softmax(x, is_in)
    g, _, _ = sinkhorn_load(grad, first, matrices, n, 0.0, MATRICES, SIZE)
    matrix = tl.where(is_in, shares + eps, 0.0)
    # Two lines of SIZE totals for each iteration: of its rows, then of its columns.
    lane = tl.program_id(0).to(tl.int64) * iterations * 2 * SIZE * MATRICES
    stream, number = tl.arange(0, SIZE), tl.arange(0, MATRICES)
    by_row = totals + lane + stream[:, None, None] * MATRICES + number[None, None, :]
    by_column = totals + lane + (SIZE + stream)[None, :, None] * MATRICES + number[None, None, :]
    total = sinkhorn_total(matrix, eps, False)
    tl.store(by_column, total)
    matrix = matrix / total
    for step in range(1, iterations):
        far = step * 2 * SIZE * MATRICES
        total = sinkhorn_total(matrix, eps, True)
        tl.store(by_row + far, total)
        matrix = matrix / total
        total = sinkhorn_total(matrix, eps, False)
        tl.store(by_column + far, total)
        matrix = matrix / total
    tl.debug_barrier()
    for back in range(1, iterations):
        far = (iterations - back) * 2 * SIZE * MATRICES
        matrix, g = sinkhorn_undo(matrix, g, tl.load(by_column + far), False)
        matrix, g = sinkhorn_undo(matrix, g, tl.load(by_row + far), True)
    matrix, g = sinkhorn_undo(matrix, g, tl.load(by_column), False)
    g = tl.where(is_in, g, 0.0)
    g = (g - tl.sum(g * shares, axis=1)[:, None, :]) * shares
    tl.store(grad_logits + offs, g.to(grad_logits.dtype.element_ty), mask=is_in)


class SinkhornTriton(torch.autograd.Function):
    """logits [N n n] -> matrices [N n n]; keeps the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float, tiles: Tiles) -> Tensor:
        """One launch."""
        out = torch.empty_like(logits)
        ctx.save_for_backward(logits)
        ctx.form = (iterations, eps, tiles)
        matrices, n = logits.shape[:2]
        sinkhorn_forward[(triton.cdiv(matrices, tiles.matrices),)](
            logits,
            out,
            matrices,
            n,
            iterations,
            eps,
            MATRICES=tiles.matrices,
            SIZE=triton.next_power_of_2(n),
            num_warps=tiles.warps,
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One launch."""
        (logits,) = ctx.saved_tensors
        iterations, eps, tiles = ctx.form
        matrices, n = logits.shape[:2]
        size, programs = triton.next_power_of_2(n), triton.cdiv(matrices, tiles.matrices)
        shape = (programs, iterations, 2, size, tiles.matrices)
        totals = torch.empty(shape, dtype=torch.float32, device=logits.device)
        grad_logits = torch.empty_like(logits)
        inputs = (logits, grads[0].contiguous(), grad_logits, totals, matrices, n, iterations, eps)
        sinkhorn_backward[(programs,)](*inputs, MATRICES=tiles.matrices, SIZE=size, num_warps=tiles.warps)
        return grad_logits, None, None, None


def sinkhorn_triton(
    logits: Float[Tensor, "*N n n"], *, iterations: int, eps: float, tiles: Tiles | None = None
) -> Float[Tensor, "*N n n"]:
    """`kernels.sinkhorn.sinkhorn`. Raises ValueError for no matrices or more than MAX_STREAMS streams."""
    n = logits.shape[-1]
    require(0 < n <= MAX_STREAMS, "logits", f"1 to {MAX_STREAMS} streams", n)
    require(logits.numel() > 0, "logits", "at least one matrix", tuple(logits.shape))
    tiles = tiles or Tiles(max(32, 2048 // triton.next_power_of_2(n) ** 2), 4)
    flat = logits.reshape(-1, n, n).contiguous()
    return cast(Tensor, SinkhornTriton.apply(flat, iterations, eps, tiles)).view(logits.shape)
