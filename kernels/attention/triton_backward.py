"""FlashAttention-2 backward (arXiv 2307.08691, algorithm 2) in Triton: delta, and the gradients of queries.

Names follow the algorithm; sizes and flags are those of the forward kernel.

    delta        rowsum(do o), less the gradient of the log-sum-exp: line 4
    p            exp(s - lse), computed again from q and k: lines 10 and 11
    dp, ds       do v^T and p (dp - delta): lines 13 and 14
    dq           sum of ds k, times the scale: line 15

The algorithm adds to dq from every tile of keys. Here one kernel goes over keys for dq, and another one over
rows for dk and dv (`triton_backward_keys`), so that no two programs write the same memory.
"""

# A kernel called by a kernel does return; its type says otherwise.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.attention.triton_forward import (
    LOG2E,
    attention_capped,
    attention_columns,
    attention_full_tiles,
    attention_interval,
    attention_opaque,
    attention_product,
    attention_rows,
    attention_store,
    attention_tile,
    attention_tokens,
)


@triton.jit
def attention_backward_rows(
    out,
    do,
    lse,
    dlse,
    lse2,
    delta,
    do_strides,
    tokens,
    length,
    REPEAT: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    HAS_DO: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of ROWS of the `length` rows of a key head: delta, and in lse2 the log-sum-exp in base 2.

    lse2 is infinite for a row that sees no key and for rows past the last, so that their p is zero.
    """
    group, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < tokens * REPEAT
    token = tl.minimum(row // REPEAT, tokens - 1).to(tl.int64)
    head = group * REPEAT + row % REPEAT
    index = (batch * tokens + token) * (groups * REPEAT) + head
    delta_i = tl.zeros([ROWS], tl.float32)
    if HAS_DO:
        do_ptrs = do + batch * do_strides[0] + token * do_strides[1] + head * do_strides[2]
        o = attention_tile(out + index * VALUE_DIM, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM).to(tl.float32)
        delta_i += tl.sum(
            o * attention_tile(do_ptrs, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM).to(tl.float32), axis=1
        )
        if V1 > 0:
            o = attention_tile(out + index * VALUE_DIM, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM).to(tl.float32)
            do1 = attention_tile(do_ptrs, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM).to(tl.float32)
            delta_i += tl.sum(o * do1, axis=1)
    if HAS_DLSE:
        delta_i -= tl.load(dlse + index)
    lse_i = tl.load(lse + index)
    lse_i = tl.where(is_row & (lse_i > float("-inf")), lse_i * LOG2E, float("inf"))
    offs = (batch * groups + group) * length + row
    tl.store(lse2 + offs, lse_i, mask=row < length)
    tl.store(delta + offs, delta_i, mask=row < length)


@triton.jit
def attention_backward_query_tiles(
    queries,
    source,
    begin,
    stop,
    low,
    high,
    row_inputs,
    dq,
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
    IS_MASKED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Lines 10 to 15 of the algorithm for the keys [begin, stop): the new dq, but for the scale."""
    q0, q1, do0, do1 = queries
    k, v, k_token, v_token, keys = source
    lse_i, delta_i = row_inputs
    dq0, dq1 = dq
    factor, cap_factor, cap = factors
    col0, col1 = columns
    offs_n = tl.arange(0, KEYS)
    for start in range(begin, stop, KEYS):
        key = start + offs_n
        offs = offs_n
        if IS_MASKED:
            offs = tl.minimum(offs_n, keys - 1 - start)
        k_ptrs = k + start * tl.cast(k_token, tl.int64) + offs * k_token
        k0 = attention_tile(k_ptrs, col0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
        k1 = k0
        if K1 > 0:
            k1 = attention_tile(k_ptrs, col1, K1, KEY_DIM, K0 + K1 > KEY_DIM)
        if V_IS_K:
            v0, v1 = k0, k1
        else:
            v_ptrs = v + start * tl.cast(v_token, tl.int64) + offs * v_token
            v0 = attention_tile(v_ptrs, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
            v1 = v0
            if V1 > 0:
                v1 = attention_tile(v_ptrs, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
        s = attention_product(q0, q1, k0, k1, K1 > 0)
        if HAS_CAP:
            s = attention_capped(s, cap_factor, cap)
            tanh_s = s / cap
        if IS_MASKED:
            is_seen = key[None, :] < high[:, None]
            if LOW > 0:
                is_seen = is_seen & (key[None, :] >= low[:, None])
            s = tl.where(is_seen, s, float("-inf"))
        p = tl.exp2(s * factor - lse_i[:, None])
        ds = p * (attention_product(do0, do1, v0, v1, V1 > 0) - delta_i[:, None])
        if HAS_CAP:
            ds = ds * (1.0 - tanh_s * tanh_s)
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="tf32x3")
        if K1 > 0 and DIM_SPLITS == 1:
            dq1 = tl.dot(ds, k1, dq1, input_precision="tf32x3")
    return dq0, dq1


@triton.jit
def attention_backward_query_segment(
    queries,
    source,
    rows,
    bounds,
    row_inputs,
    dq,
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
    IS_EXTRA: tl.constexpr,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One interval of keys of the tokens from `first` to `last`; parts as in the forward kernel."""
    tile, tokens, first, last = rows
    begin_first, stop_first = attention_interval(first, *bounds, LOW, HIGH)
    begin_last, stop_last = attention_interval(last, *bounds, LOW, HIGH)
    head_stop, full_start, full_stop = attention_full_tiles(
        begin_first, begin_last, stop_first, stop_last, KEYS, KEYS
    )
    for part in tl.static_range(3):
        if part == 0:
            a, b = begin_first, stop_last if IS_EXTRA else head_stop
        elif part == 1:
            a, b = full_start, full_stop
        else:
            a, b = full_stop, stop_last
        if (part == 0 and LOW > 0) or (part > 0 and not IS_EXTRA):
            token = attention_tokens(tile, part + 3 * IS_EXTRA, tokens, REPEAT, ROWS)
            begin, stop = attention_interval(token, *bounds, LOW, HIGH)
            dq = attention_backward_query_tiles(
                *(queries, source, a, b, begin, stop, row_inputs, dq, factors, columns),
                *(KEY_DIM, VALUE_DIM, K0, K1, V0, V1, DIM_SPLITS, LOW, V_IS_K, HAS_CAP, part != 1, KEYS),
            )
    return dq


@triton.jit
def attention_backward_queries(
    inputs,
    bounds,
    row_inputs,
    dq,
    strides,
    sizes,
    scale,
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
    HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of the queries in ROWS rows of one key head."""
    q, k, v, extra_k, extra_v = inputs
    do, lse2, delta = row_inputs
    q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides, do_strides = strides
    tokens, length, keys, extra_keys, window = sizes
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // DIM_SPLITS
    col0, col1 = attention_columns(tl.program_id(0) % DIM_SPLITS, K0, DIM_SPLITS)
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
    do_ptrs = (
        do + batch * do_strides[0] + group * REPEAT * do_strides[2] + first * tl.cast(do_strides[1], tl.int64)
    )
    do_ptrs = do_ptrs + (token_offs * do_strides[1] + head * do_strides[2])
    do0 = attention_tile(do_ptrs, col0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
    do1 = do0
    if V1 > 0:
        do1 = attention_tile(do_ptrs, V0 - col0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
    # lse2 and delta have a tile of rows more than there are: no mask is needed.
    row = (batch * groups + group) * length + first * REPEAT
    row_offs = token_offs * REPEAT + head
    lse_i = tl.load(lse2 + row + row_offs)
    delta_i = tl.load(delta + row + row_offs)
    dq0 = tl.zeros([ROWS, K0], tl.float32)
    dq1 = tl.zeros([ROWS, K1 if K1 > 0 and DIM_SPLITS == 1 else 1], tl.float32)
    queries, rows, columns = (q0, q1, do0, do1), (tile, tokens, first, last), (col0, col1)
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
    dq0, dq1 = attention_backward_query_segment(
        *(queries, source, rows, own_bounds, (lse_i, delta_i), (dq0, dq1), factors, columns),
        *(KEY_DIM, VALUE_DIM, K0, K1, V0, V1, DIM_SPLITS, LOW, HIGH, V_IS_K, HAS_CAP, False),
        *(REPEAT, ROWS, KEYS),
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
        dq0, dq1 = attention_backward_query_segment(
            *(queries, source, rows, extra_bounds, (lse_i, delta_i), (dq0, dq1), factors, columns),
            *(KEY_DIM, VALUE_DIM, K0, K1, V0, V1, DIM_SPLITS, 2, 1, V_IS_K, HAS_CAP, True),
            *(REPEAT, ROWS, KEYS),
        )
    tile = attention_opaque(tile, tokens * REPEAT)
    first, _, token_offs, head, is_row = attention_rows(tile, tokens, REPEAT, ROWS)
    row = ((batch * tokens + first) * groups + group) * REPEAT
    dq_ptrs = dq + row * KEY_DIM + (token_offs * (groups * REPEAT) + head) * KEY_DIM
    attention_store(dq_ptrs, dq0 * scale, is_row, col0, K0, KEY_DIM)
    if K1 > 0 and DIM_SPLITS == 1:
        attention_store(dq_ptrs, dq1 * scale, is_row, K0, K1, KEY_DIM)
