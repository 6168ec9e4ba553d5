"""Linear projection and cross entropy with the losses of a chunk of logits in Triton.

The products are the library's; what a kernel saves are the passes over the logits between them: one reads
them for the log-sum-exp, one replaces them by their gradients.

Letters: N tokens, D width, M vocabulary.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.cross_entropy.reference import IGNORED, LossOptions

# Logits that are in memory at once: enough rows for fast products.
LOGITS = 2**28


class Tiles(NamedTuple):
    """Rows of a chunk (None: as many as fit LOGITS), columns of a program's step, and its warps."""

    chunk: int | None
    columns: int
    warps: int


@triton.jit
def cross_entropy_logits(logits, base, column, width, cap, HAS_CAP: tl.constexpr):
    """Some logits of a row after the cap, and its slope at each."""
    is_in = column < width
    x = tl.load(logits + base + column, mask=is_in, other=0.0).to(tl.float32)
    slope = x * 0.0 + 1.0
    if HAS_CAP:
        tanh = 2.0 * tl.sigmoid(2.0 * x / cap) - 1.0
        x, slope = cap * tanh, 1.0 - tanh * tanh
    return tl.where(is_in, x, float("-inf")), slope


@triton.jit
def cross_entropy_rows(
    logits, targets, losses, squares, grads, width, cap, z, ignored,
    HAS_CAP: tl.constexpr, HAS_GRAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The loss of one row and the square of its log-sum-exp, and the gradients of its logits."""
    row = tl.program_id(0).to(tl.int64)
    base = row * width
    target = tl.load(targets + row)
    is_counted = target != ignored
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    picked = tl.zeros([], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x, _ = cross_entropy_logits(logits, base, column, width, cap, HAS_CAP)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        picked += tl.sum(tl.where(column == target, x, 0.0), axis=0)
        top = higher
    lse = top + tl.log(total)
    square = tl.where(is_counted, z * lse * lse, 0.0)
    tl.store(losses + row, tl.where(is_counted, lse - picked, 0.0))
    tl.store(squares + row, square)
    if HAS_GRAD:
        share_weight = tl.where(is_counted, 1.0 + 2.0 * z * lse, 0.0)
        target_weight = tl.where(is_counted, 1.0, 0.0)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            x, slope = cross_entropy_logits(logits, base, column, width, cap, HAS_CAP)
            grad = tl.exp(x - lse) * share_weight - tl.where(column == target, target_weight, 0.0)
            tl.store(grads + base + column, (grad * slope).to(grads.dtype.element_ty), mask=column < width)


class LinearCrossEntropyTriton(torch.autograd.Function):
    """Sums of the losses and of the squares; gradients are made in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, form: LossOptions, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        """x [N D], weight [M D], targets [N]."""
        tokens, width = x.shape[0], weight.shape[0]
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        has_grad = needs_x or needs_weight
        losses = torch.empty(2, tokens, dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if needs_weight else None
        )
        chunk = tiles.chunk or max(1, LOGITS // width)
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            rows = x[part]
            logits = _product(rows, weight.T)
            # In place where the dtypes agree; narrow gradients, as the products want them, where not.
            grads = logits if x.dtype == logits.dtype else torch.empty_like(logits, dtype=x.dtype)
            cross_entropy_rows[(len(rows),)](
                logits, targets[part], losses[0, part], losses[1, part], grads, width, form.cap or 1.0,
                form.z, IGNORED, HAS_CAP=form.cap is not None, HAS_GRAD=has_grad, COLUMNS=tiles.columns,
                num_warps=tiles.warps,
            )  # fmt: skip
            if grad_x is not None:
                torch.mm(grads, weight, out=grad_x[part])
            if grad_weight is not None:
                grad_weight.add_(_product(grads.T, rows))
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        loss, square = losses.sum(1)
        ctx.mark_non_differentiable(square)
        return loss + square, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients times the gradient of the sum."""
        grad_x, grad_weight = ctx.saved_tensors
        scaled_x = None if grad_x is None else grad_x * grads[0].to(grad_x.dtype)
        scaled_weight = None if grad_weight is None else (grad_weight * grads[0]).to(ctx.weight_dtype)
        return scaled_x, scaled_weight, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, whatever they are in."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def linear_cross_entropy_triton(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "M D"],
    targets: Int[Tensor, "N"],
    form: LossOptions,
    *,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`kernels.cross_entropy.linear_cross_entropy`. Raises ValueError for inputs on several devices."""
    for name, other in (("weight", weight), ("targets", targets)):
        require(other.device == x.device, name, f"on {x.device}", other.device)
    columns = min(4096, triton.next_power_of_2(weight.shape[0]))
    tiles = tiles or Tiles(None, columns, 8)
    out = LinearCrossEntropyTriton.apply(x.contiguous(), weight, targets.contiguous(), form, tiles)
    return cast(tuple[Tensor, Tensor], out)
