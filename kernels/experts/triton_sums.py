"""Sums over the rows of a token, of a choice or of an expert as Triton kernels, each in a fixed order."""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# A kernel's launch looks to pyright like a call of the Python function.

import triton
import triton.language as tl


@triton.jit
def experts_collect(rows, row_of, ends, out, experts, width, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of a token's rows, in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ends + experts - 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for turn in tl.static_range(TOP_K):
        row = tl.load(row_of + token * TOP_K + turn)
        source = rows + row.to(tl.int64) * width + column
        total += tl.load(source, mask=(column < width) & (row < end), other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def experts_weight_grad(
    by_weight, grad, bias, chosen, row_of, ends, out, choices, experts, width, parts,
    TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, CHOICES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of weights: the parts of column tiles, and that of the bias of the second projection."""
    choice = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    is_in = choice < choices
    row = tl.load(row_of + choice, mask=is_in, other=choices)
    is_real = row < tl.load(ends + experts - 1)
    total = tl.zeros([CHOICES], tl.float32)
    for part in range(parts):
        total += tl.load(by_weight + part * choices + row, mask=is_real, other=0.0)
    if HAS_BIAS:
        expert = tl.load(chosen + choice, mask=is_real, other=0).to(tl.int64)
        token = (choice // TOP_K).to(tl.int64)
        own = tl.arange(0, COLUMNS)
        for first in range(0, width, COLUMNS):
            column = first + own
            is_both = is_real[:, None] & (column < width)[None, :]
            g = tl.load(grad + token[:, None] * width + column[None, :], mask=is_both, other=0.0)
            shift = tl.load(bias + expert[:, None] * width + column[None, :], mask=is_both, other=0.0)
            total += tl.sum(g.to(tl.float32) * shift.to(tl.float32), axis=1)
    tl.store(out + choice, total.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def experts_bias_grad(
    rows, weights, order, ends, out, width,
    TOP_K: tl.constexpr, GATHERS: tl.constexpr, SCALES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of an expert's rows, gathered by token or not, times their weights or not."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    own = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(begin, end, ROWS):
        at = step + own
        is_in = at < end
        choice = tl.load(order + at, mask=is_in, other=0)
        source = (choice // TOP_K if GATHERS else at).to(tl.int64)
        is_both = is_in[:, None] & (column < width)[None, :]
        x = tl.load(rows + source[:, None] * width + column[None, :], mask=is_both, other=0.0).to(tl.float32)
        if SCALES:
            x *= tl.load(weights + choice).to(tl.float32)[:, None]
        total += x
    total = tl.sum(total, axis=0)
    row_of = expert.to(tl.int64) * width + column
    tl.store(out + row_of, total.to(out.dtype.element_ty), mask=column < width)
