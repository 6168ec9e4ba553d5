"""FlashAttention-2 forward (arXiv 2307.08691, algorithm 1) in Triton, and what its backward shares with it.

A query sees the keys [low, high), and with HAS_EXTRA a second interval, of the same or of other keys, under
the same softmax. No bound falls from one token to the next. Names follow the algorithm and its Triton
tutorial:

    s, p         scores and unnormalised probabilities of a tile: lines 8 and 9
    m_i, m_new   running maximum of each row before and after a tile: line 9
    l_i          running sum of p, and alpha = exp(m_i - m_new), which rescales it and acc: lines 9 and 10
    acc          running output, normalised at the end, as is lse_i = m_i + log l_i: lines 12 and 13

The R = REPEAT query heads of a key head share its tiles: row i of a tile is token i // R under head i % R.
A head of KEY_DIM columns is loaded as tiles of K0 and K1 columns (k0, k1; 0 for no second one), values as V0
and V1. With DIM_SPLITS of 2 two programs compute the same scores, and each the output for its own V0 columns.
V_IS_K: values are the keys. LOW and HIGH: where bounds come from, as `attention_interval` takes them.
MASKED_KEYS: keys of a tile at the ends of an interval, which are masked. x_strides: strides of rows, tokens
and heads; x_token: that of tokens. What belongs together comes as one tuple, and is named where it is taken
apart; `source` is the keys and values of one interval.
"""

# A kernel called by a kernel does return; its type says otherwise.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Below every score, yet finite, so that the difference of two of them is a number.
LEAST = tl.constexpr(-1.0e30)


@triton.jit
def attention_tile(row_ptrs, start, WIDTH: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """WIDTH columns from `start` on of the rows at `row_ptrs`; if PADDED, zero past DIM."""
    column = start + tl.arange(0, WIDTH)
    ptrs = row_ptrs[:, None] + column[None, :]
    if PADDED:
        tile = tl.load(ptrs, mask=(column < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def attention_columns(dim_split, K0: tl.constexpr, DIM_SPLITS: tl.constexpr):
    """First columns of tiles 0 and 1 of a head; of two DIM_SPLITS the program's own columns are tile 0."""
    col0 = dim_split * K0 if DIM_SPLITS > 1 else 0
    col1 = K0 - col0
    return col0, col1


@triton.jit
def attention_product(a0, a1, b0, b1, HAS_SECOND: tl.constexpr):
    """a b^T, over one or two tiles of columns."""
    out = tl.dot(a0, tl.trans(b0), input_precision="tf32x3")
    if HAS_SECOND:
        out = tl.dot(a1, tl.trans(b1), out, input_precision="tf32x3")
    return out


@triton.jit
def attention_capped(s, cap_factor, cap):
    """cap tanh(s scale / logit_cap), with cap_factor = 2 log2(e) scale / logit_cap."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(s * cap_factor))


@triton.jit
def attention_rows(tile, tokens, REPEAT: tl.constexpr, ROWS: tl.constexpr):
    """First and last token of a tile of rows; of each row its token less the first, its head, and whether it
    exists.

    Rows past the end take the last token. Offsets from the first token fit in 32 bits.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    first = tile * ROWS // REPEAT
    last = tl.minimum((tile * ROWS + ROWS - 1) // REPEAT, tokens - 1)
    token_offs = tl.minimum(row // REPEAT, tokens - 1) - first
    return first, last, token_offs, row % REPEAT, row < tokens * REPEAT


@triton.jit
def attention_opaque(number, bound):
    """The same number, of which only we know that it is below the bound.

    The compiler then computes what follows from it where it is used, instead of keeping it in registers
    through the loops before.
    """
    return tl.minimum(number, bound)


@triton.jit
def attention_tokens(tile, use, tokens, REPEAT: tl.constexpr, ROWS: tl.constexpr):
    """The token of each row, computed again for each `use`."""
    first, _, token_offs, _, _ = attention_rows(
        attention_opaque(tile, tokens * REPEAT + use), tokens, REPEAT, ROWS
    )
    return first + token_offs


@triton.jit
def attention_interval(token, low, high, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    """First key that a query sees, and the one after its last; for one token or many.

    LOW: 0 for all keys from the first on, 1 for the last `window`, 2 loaded from `low`. HIGH: 0 for keys up
    to the token itself, 1 loaded from `high`.
    """
    if LOW == 0:
        begin = token * 0
    elif LOW == 1:
        begin = tl.maximum(token - window + 1, 0)
    else:
        begin = tl.load(low + token)
    stop = token + 1 if HIGH == 0 else tl.load(high + token)
    return begin, stop


@triton.jit
def attention_full_tiles(
    begin_first, begin_last, stop_first, stop_last, MASKED_KEYS: tl.constexpr, FULL_KEYS: tl.constexpr
):
    """End of the masked tiles at the head of an interval, and start and stop of the tiles that need no mask.

    FlexAttention's full blocks: every row of the tile sees every key. The bounds are those of the first and
    of the last row. Full tiles have FULL_KEYS keys, those before and after MASKED_KEYS, and together they
    cover [begin_first, stop_last).
    """
    full_start = begin_first + tl.cdiv(begin_last - begin_first, MASKED_KEYS) * MASKED_KEYS
    full_stop = full_start + tl.maximum(stop_first - full_start, 0) // FULL_KEYS * FULL_KEYS
    return tl.minimum(full_start, stop_last), full_start, full_stop


@triton.jit
def attention_forward_tiles(
    queries,
    source,
    begin,
    stop,
    low,
    high,
    state,
    factors,
    columns,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    DIM_SPLITS: tl.constexpr,
    LOW: tl.constexpr,
    V_IS_K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    IS_MASKED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Lines 6 to 11 of the algorithm for the keys [begin, stop): the new m_i, l_i and acc."""
    q0, q1 = queries
    k, v, k_token, v_token, keys = source
    m_i, l_i, acc0, acc1 = state
    factor, cap_factor, cap = factors
    col0, col1 = columns
    offs_n = tl.arange(0, KEYS)
    for start in range(begin, stop, KEYS):
        key = start + offs_n
        offs = offs_n
        if IS_MASKED:
            # Keys past the end are read as the last one, and masked.
            offs = tl.minimum(offs_n, keys - 1 - start)
        # Offsets within a tile fit in 32 bits, which take half the registers of 64.
        k_ptrs = k + start * tl.cast(k_token, tl.int64) + offs * k_token
        k0 = attention_tile(k_ptrs, col0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
        k1 = k0
        if K1 > 0:
            k1 = attention_tile(k_ptrs, col1, K1, KEY_DIM, K0 + K1 > KEY_DIM)
        s = attention_product(q0, q1, k0, k1, K1 > 0)
        if HAS_CAP:
            s = attention_capped(s, cap_factor, cap)
        if IS_MASKED:
            is_seen = key[None, :] < high[:, None]
            if LOW > 0:
                is_seen = is_seen & (key[None, :] >= low[:, None])
            s = tl.where(is_seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        m_scaled = m_new * factor
        p = tl.exp2(s * factor - m_scaled[:, None])
        alpha = tl.exp2(m_i * factor - m_scaled)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        m_i = m_new
        if HAS_VALUES:
            acc0 = acc0 * alpha[:, None]
            if V_IS_K:
                v0, v1 = k0, k1
            else:
                v_ptrs = v + start * tl.cast(v_token, tl.int64) + offs * v_token
                v0 = attention_tile(v_ptrs, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
                v1 = v0
                if V1 > 0:
                    v1 = attention_tile(v_ptrs, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
            p = p.to(v0.dtype)
            acc0 = tl.dot(p, v0, acc0, input_precision="tf32x3")
            if V1 > 0 and DIM_SPLITS == 1:
                acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="tf32x3")
    return m_i, l_i, acc0, acc1


@triton.jit
def attention_forward_segment(
    queries,
    source,
    rows,
    bounds,
    state,
    factors,
    columns,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    DIM_SPLITS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    V_IS_K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    IS_EXTRA: tl.constexpr,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED_KEYS: tl.constexpr,
):
    """One interval of keys of the tokens from `first` to `last`; only the tiles at its two ends are masked.

    The extra interval is short: all of its tiles are masked, in one loop.
    """
    tile, tokens, first, last = rows
    begin_first, stop_first = attention_interval(first, *bounds, LOW, HIGH)
    begin_last, stop_last = attention_interval(last, *bounds, LOW, HIGH)
    head_stop, full_start, full_stop = attention_full_tiles(
        begin_first, begin_last, stop_first, stop_last, MASKED_KEYS, KEYS
    )
    for part in tl.static_range(3):
        # Masked tiles at the head, full tiles, and masked tiles at the end.
        if part == 0:
            a, b = begin_first, stop_last if IS_EXTRA else head_stop
        elif part == 1:
            a, b = full_start, full_stop
        else:
            a, b = full_stop, stop_last
        if (part == 0 and LOW > 0) or (part > 0 and not IS_EXTRA):
            token = attention_tokens(tile, part + 3 * IS_EXTRA, tokens, REPEAT, ROWS)
            begin, stop = attention_interval(token, *bounds, LOW, HIGH)
            state = attention_forward_tiles(
                *(queries, source, a, b, begin, stop, state, factors, columns),
                *(KEY_DIM, VALUE_DIM, K0, K1, V0, V1, DIM_SPLITS, LOW, V_IS_K, HAS_CAP, HAS_VALUES),
                *(part != 1, KEYS if part == 1 else MASKED_KEYS),
            )
    return state


@triton.jit
def attention_forward(
    inputs,
    bounds,
    sinks,
    outputs,
    strides,
    sizes,
    factors,
    REPEAT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    DIM_SPLITS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    V_IS_K: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED_KEYS: tl.constexpr,
):
    """Output and log-sum-exp of ROWS rows of one key head."""
    q, k, v, extra_k, extra_v = inputs
    q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides = strides
    tokens, keys, extra_keys, window = sizes
    factor, _, _ = factors
    # The last rows see the most keys: they go first, and the short ones fill the end of the launch.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // DIM_SPLITS
    dim_split = tl.program_id(0) % DIM_SPLITS
    col0, col1 = attention_columns(dim_split, K0, DIM_SPLITS)
    group, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    first, last, token_offs, head, is_row = attention_rows(tile, tokens, REPEAT, ROWS)
    q_ptrs = (
        q + batch * q_strides[0] + group * REPEAT * q_strides[2] + first * tl.cast(q_strides[1], tl.int64)
    )
    q_ptrs = q_ptrs + (token_offs * q_strides[1] + head * q_strides[2])
    q0 = attention_tile(q_ptrs, col0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
    q1 = q0
    if K1 > 0:
        q1 = attention_tile(q_ptrs, col1, K1, KEY_DIM, K0 + K1 > KEY_DIM)
    m_i = tl.full([ROWS], LEAST, tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 and DIM_SPLITS == 1 else 1], tl.float32)
    queries, rows, state, columns = (
        (q0, q1),
        (tile, tokens, first, last),
        (m_i, l_i, acc0, acc1),
        (col0, col1),
    )
    source = (
        k + batch * k_strides[0] + group * k_strides[2],
        v + batch * v_strides[0] + group * v_strides[2],
        k_strides[1],
        v_strides[1],
        keys,
    )
    own_bounds = (
        bounds[0] + batch * tokens if LOW == 2 else bounds[0],
        bounds[1] + batch * tokens if HIGH == 1 else bounds[1],
        window,
    )
    state = attention_forward_segment(
        *(queries, source, rows, own_bounds, state, factors, columns),
        *(KEY_DIM, VALUE_DIM, K0, K1, V0, V1, DIM_SPLITS, LOW, HIGH, V_IS_K, HAS_CAP, HAS_VALUES, False),
        *(REPEAT, ROWS, KEYS, MASKED_KEYS),
    )
    if HAS_EXTRA:
        source = (
            extra_k + batch * extra_k_strides[0] + group * extra_k_strides[2],
            extra_v + batch * extra_v_strides[0] + group * extra_v_strides[2],
            extra_k_strides[1],
            extra_v_strides[1],
            extra_keys,
        )
        extra_bounds = (bounds[2] + batch * tokens, bounds[3] + batch * tokens, window)
        state = attention_forward_segment(
            *(queries, source, rows, extra_bounds, state, factors, columns),
            *(KEY_DIM, VALUE_DIM, K0, K1, V0, V1, DIM_SPLITS, 2, 1, V_IS_K, HAS_CAP, HAS_VALUES, True),
            *(REPEAT, ROWS, KEYS, MASKED_KEYS),
        )
    m_i, l_i, acc0, acc1 = state
    out, lse = outputs
    tile = attention_opaque(tile, tokens * REPEAT)
    first, _, token_offs, head, is_row = attention_rows(tile, tokens, REPEAT, ROWS)
    m_scaled = m_i * factor
    alpha = tl.full([ROWS], 1.0, tl.float32)
    if HAS_SINKS:
        # At the end and not as the first score: a large sink then rounds no p.
        sink = tl.load(sinks + group * REPEAT + head).to(tl.float32) * LOG2E
        m_new = tl.maximum(m_scaled, sink)
        alpha = tl.exp2(m_scaled - m_new)
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        m_scaled = m_new
    is_seen = l_i > 0
    l_i = tl.where(is_seen, l_i, 1.0)
    lse_i = tl.where(is_seen, (m_scaled + tl.log2(l_i)) / LOG2E, float("-inf"))
    row = ((batch * tokens + first) * groups + group) * REPEAT
    row_offs = token_offs * (groups * REPEAT) + head
    tl.store(lse + row + row_offs, lse_i, mask=is_row & (dim_split == 0))
    if HAS_VALUES:
        inv_l = tl.where(is_seen, alpha / l_i, 0.0)
        out_ptrs = out + row * VALUE_DIM + row_offs * VALUE_DIM
        attention_store(out_ptrs, acc0 * inv_l[:, None], is_row, col0, V0, VALUE_DIM)
        if V1 > 0 and DIM_SPLITS == 1:
            attention_store(out_ptrs, acc1 * inv_l[:, None], is_row, V0, V1, VALUE_DIM)


@triton.jit
def attention_store(row_ptrs, tile, is_in, start, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Writes WIDTH columns from `start` on of the rows at `row_ptrs`, where is_in and within DIM."""
    column = start + tl.arange(0, WIDTH)
    inside = is_in[:, None] & (column < DIM)[None, :]
    tl.store(row_ptrs[:, None] + column[None, :], tile.to(row_ptrs.dtype.element_ty), mask=inside)
