"""Grouped matrix products of routed experts as Triton kernels: rows of an expert times its matrix.

A program makes one tile of ROWS rows and COLUMNS columns. Row tiles never mix experts (`Sorted`), programs
beyond the last tile return at once, and GROUP row tiles take turns at each column, so that the matrices of an
expert and the rows stay in the cache. Rows of x and of gradients are gathered as they are loaded.

Letters: R sorted rows, D width, F expert hidden, H columns before the activation.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# A kernel's launch looks to pyright like a call of the Python function.

import triton
import triton.language as tl

from kernels.experts.triton_activation import activate_gated, activate_plain, round_on_side

# Columns that epilogues take at a time, forward and backward.
PART = tl.constexpr(32)
GRAD_PART = tl.constexpr(16)


@triton.jit
def experts_tile(tiles, columns, GROUP: tl.constexpr):
    """Row tile and column tile of this program, -1 beyond the last row tile."""
    program = tl.program_id(0)
    count = tl.load(tiles)
    span = GROUP * columns
    first = (program // span) * GROUP
    size = tl.maximum(tl.minimum(count - first, GROUP), 1)
    row = first + (program % span) % size
    return tl.where(program < count * columns, row, -1), (program % span) // size


@triton.jit
def experts_columns(start, COLUMNS: tl.constexpr, IS_GATED: tl.constexpr, hidden):
    """Rows of gate_up behind the columns of a tile: gates and ups by turns, so that pairs are neighbours."""
    column = tl.arange(0, COLUMNS)
    if IS_GATED:
        # Those beyond the last are multiplied in vain and not stored.
        return (column % 2) * hidden + tl.minimum(start + column // 2, hidden - 1)
    else:
        return tl.minimum(start + column, hidden - 1)


@triton.jit
def experts_halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first half of the columns, and the second."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def experts_activate(
    total, pre, active, weight, row, end, start, hidden,
    gate_limit, gate_below, gate_above, up_limit, up_below, up_above,
    KIND: tl.constexpr, HAS_LIMIT: tl.constexpr, SCALES_INPUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores a tile before and after the activation, a part at a time: whole, it takes too many registers."""
    IS_GATED: tl.constexpr = KIND != "relu2"
    WIDE: tl.constexpr = COLUMNS // 2 if IS_GATED else COLUMNS
    if COLUMNS > PART:
        low, high = experts_halves(total, ROWS, COLUMNS)
        experts_activate(
            low, pre, active, weight, row, end, start, hidden,
            gate_limit, gate_below, gate_above, up_limit, up_below, up_above,
            KIND, HAS_LIMIT, SCALES_INPUT, ROWS, COLUMNS // 2,
        )  # fmt: skip
        experts_activate(
            high, pre, active, weight, row, end, start + WIDE // 2, hidden,
            gate_limit, gate_below, gate_above, up_limit, up_below, up_above,
            KIND, HAS_LIMIT, SCALES_INPUT, ROWS, COLUMNS // 2,
        )  # fmt: skip
    else:
        column = start + tl.arange(0, WIDE)
        is_in = (row < end)[:, None] & (column < hidden)[None, :]
        at = row.to(tl.int64)[:, None]
        if IS_GATED:
            gate, up = total.reshape(ROWS, WIDE, 2).split()
            out, _, _ = activate_gated(gate, up, gate_limit, up_limit, KIND, HAS_LIMIT)
            if HAS_LIMIT and pre.dtype.element_ty != tl.float32:
                gate = round_on_side(gate, gate_limit, gate_below, gate_above)
                size = round_on_side(tl.abs(up), up_limit, up_below, up_above)
                up = tl.where(up < 0.0, -size, size)
            pre_ptrs = pre + at * (2 * hidden) + column[None, :]
            tl.store(pre_ptrs, gate.to(pre.dtype.element_ty), mask=is_in)
            tl.store(pre_ptrs + hidden, up.to(pre.dtype.element_ty), mask=is_in)
        else:
            out, _ = activate_plain(total)
            tl.store(pre + at * hidden + column[None, :], total.to(pre.dtype.element_ty), mask=is_in)
        if not SCALES_INPUT:
            out *= weight
        tl.store(active + at * hidden + column[None, :], out.to(active.dtype.element_ty), mask=is_in)


@triton.jit
def experts_activate_grad(
    total, pre, active, grad_pre, weight, row, end, start, hidden, gate_limit, up_limit,
    KIND: tl.constexpr, HAS_LIMIT: tl.constexpr, SCALES_INPUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From gradients of active rows those before the activation, and their product with the active rows."""
    if COLUMNS > GRAD_PART:
        low, high = experts_halves(total, ROWS, COLUMNS)
        share = experts_activate_grad(
            low, pre, active, grad_pre, weight, row, end, start, hidden, gate_limit, up_limit,
            KIND, HAS_LIMIT, SCALES_INPUT, ROWS, COLUMNS // 2,
        )  # fmt: skip
        share += experts_activate_grad(
            high, pre, active, grad_pre, weight, row, end, start + COLUMNS // 2, hidden, gate_limit, up_limit,
            KIND, HAS_LIMIT, SCALES_INPUT, ROWS, COLUMNS // 2,
        )  # fmt: skip
        return share
    else:
        column = start + tl.arange(0, COLUMNS)
        is_in = (row < end)[:, None] & (column < hidden)[None, :]
        at = row.to(tl.int64)[:, None]
        offs = at * hidden + column[None, :]
        both = at * (2 * hidden) + column[None, :]
        if KIND != "relu2":
            gate = tl.load(pre + both, mask=is_in, other=0.0).to(tl.float32)
            up = tl.load(pre + both + hidden, mask=is_in, other=0.0).to(tl.float32)
            out, by_gate, by_up = activate_gated(gate, up, gate_limit, up_limit, KIND, HAS_LIMIT)
        else:
            out, by_gate = activate_plain(tl.load(pre + offs, mask=is_in, other=0.0).to(tl.float32))
        share = tl.sum(total * out, axis=1)
        if not SCALES_INPUT:
            total *= weight
            out *= weight
        tl.store(active + offs, out.to(active.dtype.element_ty), mask=is_in)
        if KIND != "relu2":
            tl.store(grad_pre + both, (total * by_gate).to(grad_pre.dtype.element_ty), mask=is_in)
            tl.store(grad_pre + both + hidden, (total * by_up).to(grad_pre.dtype.element_ty), mask=is_in)
        else:
            tl.store(grad_pre + offs, (total * by_gate).to(grad_pre.dtype.element_ty), mask=is_in)
        return share


@triton.jit
def experts_up(
    x, gate_up, bias, weights, lists, pre, active, width, hidden, columns, gates, ups,
    TOP_K: tl.constexpr, KIND: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALES_INPUT: tl.constexpr, IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x through the first projection: its result, and active rows times the weight of their choice.

    gates, ups: limit, and bounds below and above, of gates and of ups.
    """
    order, tile_expert, tile_first, ends, tiles = lists
    row_tile, column_tile = experts_tile(tiles, columns, GROUP)
    if row_tile < 0:
        return
    IS_GATED: tl.constexpr = KIND != "relu2"
    WIDE: tl.constexpr = COLUMNS // 2 if IS_GATED else COLUMNS
    expert = tl.load(tile_expert + row_tile).to(tl.int64)
    first, end = tl.load(tile_first + row_tile), tl.load(ends + expert)
    row = first + tl.arange(0, ROWS)
    choice = tl.load(order + tl.minimum(row, end - 1))
    start = column_tile * WIDE
    source = experts_columns(start, COLUMNS, IS_GATED, hidden)
    rows_of = (2 if IS_GATED else 1) * hidden
    inner = tl.arange(0, INNER)
    left = x + (choice // TOP_K).to(tl.int64)[:, None] * width + inner[None, :]
    right = gate_up + (expert * rows_of + source)[None, :] * width + inner[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, width, INNER):
        if IS_EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=inner[None, :] < width - step, other=0.0)
            b = tl.load(right, mask=inner[:, None] < width - step, other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
        left += INNER
        right += INNER
    weight = tl.load(weights + choice).to(tl.float32)[:, None]
    if SCALES_INPUT:
        total *= weight
    if HAS_BIAS:
        total += tl.load(bias + expert * rows_of + source).to(tl.float32)[None, :]
    experts_activate(
        total, pre, active, weight, row, end, start, hidden, *gates, *ups,
        KIND, HAS_LIMIT, SCALES_INPUT, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def experts_down(
    active, down, bias, weights, order, tile_expert, tile_first, ends, tiles, out, width, hidden, columns,
    HAS_BIAS: tl.constexpr, SCALES_INPUT: tl.constexpr, IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Active rows through the second projection."""
    row_tile, column_tile = experts_tile(tiles, columns, GROUP)
    if row_tile < 0:
        return
    expert = tl.load(tile_expert + row_tile).to(tl.int64)
    first, end = tl.load(tile_first + row_tile), tl.load(ends + expert)
    row = first + tl.arange(0, ROWS)
    inside = tl.minimum(row, end - 1)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    left = active + inside.to(tl.int64)[:, None] * hidden + inner[None, :]
    right = down + (expert * width + tl.minimum(column, width - 1))[None, :] * hidden + inner[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, hidden, INNER):
        if IS_EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=inner[None, :] < hidden - step, other=0.0)
            b = tl.load(right, mask=inner[:, None] < hidden - step, other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
        left += INNER
        right += INNER
    if HAS_BIAS:
        shift = tl.load(bias + expert * width + column, mask=column < width, other=0.0).to(tl.float32)
        if SCALES_INPUT:
            total += shift[None, :]
        else:
            weight = tl.load(weights + tl.load(order + inside)).to(tl.float32)
            total += weight[:, None] * shift[None, :]
    is_in = (row < end)[:, None] & (column < width)[None, :]
    offs = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + offs, total.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def experts_down_grad(
    grad, down, weights, lists, pre, active, grad_pre, by_weight,
    width, hidden, columns, choices, gate_limit, up_limit,
    TOP_K: tl.constexpr, KIND: tl.constexpr, HAS_LIMIT: tl.constexpr, SCALES_INPUT: tl.constexpr,
    IS_EVEN: tl.constexpr, IS_EVEN_HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients back through the second projection and the activation, the weight's by column tile.

    Writes the active rows once more, as the gradient of `down` needs them.
    """
    order, tile_expert, tile_first, ends, tiles = lists
    row_tile, column_tile = experts_tile(tiles, columns, GROUP)
    if row_tile < 0:
        return
    expert = tl.load(tile_expert + row_tile).to(tl.int64)
    first, end = tl.load(tile_first + row_tile), tl.load(ends + expert)
    row = first + tl.arange(0, ROWS)
    choice = tl.load(order + tl.minimum(row, end - 1))
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    left = grad + (choice // TOP_K).to(tl.int64)[:, None] * width + inner[None, :]
    right = down + expert * width * hidden
    beside = inner[:, None] * hidden + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, width, INNER):
        if IS_EVEN and IS_EVEN_HIDDEN:
            a, b = tl.load(left), tl.load(right + beside)
        elif IS_EVEN:
            a = tl.load(left)
            b = tl.load(right + beside, mask=(column < hidden)[None, :], other=0.0)
        else:
            is_in = inner < width - step
            a = tl.load(left, mask=is_in[None, :], other=0.0)
            b = tl.load(right + beside, mask=is_in[:, None] & (column < hidden)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
        left += INNER
        right += INNER * hidden
    # Choices are loaded again, which is cheaper than keeping them through the loop.
    weight = tl.load(weights + tl.load(order + tl.minimum(row, end - 1))).to(tl.float32)[:, None]
    share = experts_activate_grad(
        total, pre, active, grad_pre, weight, row, end,
        column_tile * COLUMNS, hidden, gate_limit, up_limit, KIND, HAS_LIMIT, SCALES_INPUT, ROWS, COLUMNS,
    )  # fmt: skip
    if not SCALES_INPUT:
        tl.store(by_weight + column_tile * choices + row, share, mask=row < end)


@triton.jit
def experts_up_grad(
    grad_pre, gate_up, x, weights, order, tile_expert, tile_first, ends, tiles, out, by_weight,
    width, depth, columns, choices,
    TOP_K: tl.constexpr, SCALES_INPUT: tl.constexpr, IS_EVEN: tl.constexpr, IS_EVEN_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients back through the first projection: those of x by choice. depth is H."""
    row_tile, column_tile = experts_tile(tiles, columns, GROUP)
    if row_tile < 0:
        return
    expert = tl.load(tile_expert + row_tile).to(tl.int64)
    first, end = tl.load(tile_first + row_tile), tl.load(ends + expert)
    row = first + tl.arange(0, ROWS)
    inside = tl.minimum(row, end - 1)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    left = grad_pre + inside.to(tl.int64)[:, None] * depth + inner[None, :]
    right = gate_up + expert * depth * width
    beside = inner[:, None] * width + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, depth, INNER):
        if IS_EVEN and IS_EVEN_WIDTH:
            a, b = tl.load(left), tl.load(right + beside)
        elif IS_EVEN:
            a = tl.load(left)
            b = tl.load(right + beside, mask=(column < width)[None, :], other=0.0)
        else:
            is_in = inner < depth - step
            a = tl.load(left, mask=is_in[None, :], other=0.0)
            b = tl.load(right + beside, mask=is_in[:, None] & (column < width)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
        left += INNER
        right += INNER * width
    is_in = (row < end)[:, None] & (column < width)[None, :]
    if SCALES_INPUT:
        choice = tl.load(order + inside)
        source = x + (choice // TOP_K).to(tl.int64)[:, None] * width + column[None, :]
        entered = tl.load(source, mask=is_in, other=0.0).to(tl.float32)
        share = tl.sum(total * entered, axis=1)
        tl.store(by_weight + column_tile * choices + row, share, mask=row < end)
        total *= tl.load(weights + choice).to(tl.float32)[:, None]
    offs = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + offs, total.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def experts_outer(
    left, right, weights, order, ends, out, left_width, right_width, left_tiles, right_tiles,
    TOP_K: tl.constexpr, GATHERS_LEFT: tl.constexpr, GATHERS_RIGHT: tl.constexpr, SCALES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """left^T right over the rows of each expert: one tile of the gradient of a matrix, zeros without rows.

    A gathered side is indexed by token. With SCALES the right side is multiplied by the choices' weights.
    """
    program = tl.program_id(0)
    count = left_tiles * right_tiles
    expert = (program // count).to(tl.int64)
    program = program % count
    span = GROUP * right_tiles
    first_tile = (program // span) * GROUP
    size = tl.minimum(left_tiles - first_tile, GROUP)
    row = (first_tile + (program % span) % size) * ROWS + tl.arange(0, ROWS)
    column = (program % span) // size * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    inner = tl.arange(0, INNER)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(begin, end, INNER):
        at = step + inner
        is_in = at < end
        choice = tl.load(order + at, mask=is_in, other=0)
        token = (choice // TOP_K).to(tl.int64)
        from_left = token if GATHERS_LEFT else at.to(tl.int64)
        from_right = token if GATHERS_RIGHT else at.to(tl.int64)
        is_left, is_right = is_in[:, None] & (row < left_width)[None, :], is_in[:, None]
        is_right = is_right & (column < right_width)[None, :]
        a = tl.load(left + from_left[:, None] * left_width + row[None, :], mask=is_left, other=0.0)
        b = tl.load(right + from_right[:, None] * right_width + column[None, :], mask=is_right, other=0.0)
        if SCALES:
            weight = tl.load(weights + choice).to(tl.float32)
            b = (b.to(tl.float32) * weight[:, None]).to(b.dtype)
        total = tl.dot(tl.trans(a), b, total, input_precision="tf32x3")
    offs = expert * left_width * right_width + row.to(tl.int64)[:, None] * right_width + column[None, :]
    is_in = (row < left_width)[:, None] & (column < right_width)[None, :]
    tl.store(out + offs, total.to(out.dtype.element_ty), mask=is_in)
