"""FlashAttention-2 backward (arXiv 2307.08691, algorithm 2) in Triton: the gradients of keys and values.

A program holds a tile of keys (lines 6 and 7) and goes over the rows that see them, which are an interval,
too: dv = sum of p^T do (line 12) and dk = sum of ds^T q (line 16). Scores are transposed: keys by rows. Names
are those of `triton_backward`, sizes and flags those of the forward kernel. V_IS_K: dk is the sum of both.
"""

# A kernel called by a kernel does return; its type says otherwise.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.attention.triton_forward import (
    attention_capped,
    attention_columns,
    attention_full_tiles,
    attention_opaque,
    attention_product,
    attention_store,
    attention_tile,
)


@triton.jit
def attention_query_interval(key, first, end, tokens, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    """First query that sees a key, and the one after its last; flags as in `attention_interval`.

    first, end: these bounds, [B S], loaded where the keys' bounds are loaded.
    """
    begin = key if HIGH == 0 else tl.load(first + key)
    if LOW == 0:
        stop = key * 0 + tokens
    elif LOW == 1:
        stop = tl.minimum(key + window, tokens)
    else:
        stop = tl.load(end + key)
    return begin, stop


@triton.jit
def attention_backward_key_tiles(
    keys,
    rows,
    strides,
    tokens,
    span,
    first,
    end,
    sums,
    scale,
    factors,
    columns,
    REPEAT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    DIM_SPLITS: tl.constexpr,
    V_IS_K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WANTS_K: tl.constexpr,
    WANTS_V: tl.constexpr,
    IS_MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Lines 10 to 16 of the algorithm for the rows [begin, stop): the new dk and dv."""
    k0, k1, v0, v1 = keys
    q, do, lse2, delta = rows
    q_strides, do_strides = strides
    begin, stop, step = span
    dk0, dk1, dv0, dv1 = sums
    factor, cap_factor, cap = factors
    col0, col1 = columns
    for start in range(begin, stop, step):
        row = start + tl.arange(0, ROWS)
        token = start // REPEAT
        if ROWS % REPEAT == 0:
            # `begin` and the step are whole tokens.
            token_offs, head = tl.arange(0, ROWS) // REPEAT, tl.arange(0, ROWS) % REPEAT
        else:
            token_offs, head = row // REPEAT - token, row % REPEAT
        # Rows past the end are read as the last token; their p is zero.
        token_offs = tl.minimum(token_offs, tokens - 1 - token)
        q_ptrs = (
            q + token * tl.cast(q_strides[1], tl.int64) + (token_offs * q_strides[1] + head * q_strides[2])
        )
        q0 = attention_tile(q_ptrs, col0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
        q1 = q0
        if K1 > 0:
            q1 = attention_tile(q_ptrs, col1, K1, KEY_DIM, K0 + K1 > KEY_DIM)
        do_ptrs = (
            do
            + token * tl.cast(do_strides[1], tl.int64)
            + (token_offs * do_strides[1] + head * do_strides[2])
        )
        do0 = attention_tile(do_ptrs, col0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
        do1 = do0
        if V1 > 0:
            do1 = attention_tile(do_ptrs, V0 - col0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
        lse_i = tl.load(lse2 + row)
        s = attention_product(k0, k1, q0, q1, K1 > 0)
        if HAS_CAP:
            s = attention_capped(s, cap_factor, cap)
            tanh_s = s / cap
        if IS_MASKED:
            is_seen = (row[None, :] >= first[:, None]) & (row[None, :] < end[:, None])
            s = tl.where(is_seen, s, float("-inf"))
        p = tl.exp2(s * factor - lse_i[None, :])
        if WANTS_V:
            p_cast = p.to(do0.dtype)
            if V_IS_K:
                dk0 = tl.dot(p_cast, do0, dk0, input_precision="tf32x3")
                if K1 > 0 and DIM_SPLITS == 1:
                    dk1 = tl.dot(p_cast, do1, dk1, input_precision="tf32x3")
            else:
                dv0 = tl.dot(p_cast, do0, dv0, input_precision="tf32x3")
                if V1 > 0:
                    dv1 = tl.dot(p_cast, do1, dv1, input_precision="tf32x3")
        if WANTS_K:
            ds = attention_product(v0, v1, do0, do1, V1 > 0) - tl.load(delta + row)[None, :]
            ds = p * ds
            if HAS_CAP:
                ds = ds * (1.0 - tanh_s * tanh_s)
            if V_IS_K:
                # The same sum holds the gradient as a value, which no scale multiplies.
                ds = ds * scale
            ds = ds.to(q0.dtype)
            dk0 = tl.dot(ds, q0, dk0, input_precision="tf32x3")
            if K1 > 0 and DIM_SPLITS == 1:
                dk1 = tl.dot(ds, q1, dk1, input_precision="tf32x3")
    return dk0, dk1, dv0, dv1


@triton.jit
def attention_backward_keys(
    inputs,
    bounds,
    row_inputs,
    grads,
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
    WANTS_K: tl.constexpr,
    WANTS_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of KEYS keys and values of one key head from every splits-th tile of rows."""
    q, k, v = inputs
    first, end, extra_first, extra_end = bounds
    do, lse2, delta = row_inputs
    q_strides, k_strides, v_strides, do_strides = strides
    tokens, length, keys, splits, window = sizes
    col0, col1 = attention_columns(tl.program_id(0) % DIM_SPLITS, K0, DIM_SPLITS)
    split, tile = tl.program_id(0) // DIM_SPLITS % splits, tl.program_id(0) // DIM_SPLITS // splits
    group, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    start = tile * KEYS
    offs = tl.minimum(tl.arange(0, KEYS), keys - 1 - start)
    k_ptrs = (
        k
        + batch * k_strides[0]
        + group * k_strides[2]
        + start * tl.cast(k_strides[1], tl.int64)
        + offs * k_strides[1]
    )
    k0 = attention_tile(k_ptrs, col0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
    k1 = k0
    if K1 > 0:
        k1 = attention_tile(k_ptrs, col1, K1, KEY_DIM, K0 + K1 > KEY_DIM)
    v0, v1 = k0, k1
    if WANTS_K and not V_IS_K:
        v_ptrs = (
            v
            + batch * v_strides[0]
            + group * v_strides[2]
            + start * tl.cast(v_strides[1], tl.int64)
            + offs * v_strides[1]
        )
        v0 = attention_tile(v_ptrs, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
        v1 = v0
        if V1 > 0:
            v1 = attention_tile(v_ptrs, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
    dk0 = tl.zeros([KEYS, K0 if WANTS_K else 1], tl.float32)
    dk1 = tl.zeros([KEYS, K1 if WANTS_K and K1 > 0 and DIM_SPLITS == 1 else 1], tl.float32)
    dv0 = tl.zeros([KEYS, V0 if WANTS_V and not V_IS_K else 1], tl.float32)
    dv1 = tl.zeros([KEYS, V1 if WANTS_V and not V_IS_K and V1 > 0 else 1], tl.float32)
    q_batch = q + batch * q_strides[0] + group * REPEAT * q_strides[2]
    do_batch = do + batch * do_strides[0] + group * REPEAT * do_strides[2]
    row = (batch * groups + group) * length
    last = tl.minimum(start + KEYS, keys) - 1
    for segment in tl.static_range(2 if HAS_EXTRA else 1):
        if segment == 0:
            begins = first + batch * keys if HIGH == 1 else first
            ends = end + batch * keys if LOW == 2 else end
        else:
            begins, ends = extra_first + batch * keys, extra_end + batch * keys
        begin_first, stop_first = attention_query_interval(
            start, begins, ends, tokens, window, LOW if segment == 0 else 2, HIGH if segment == 0 else 1
        )
        begin_last, stop_last = attention_query_interval(
            last, begins, ends, tokens, window, LOW if segment == 0 else 2, HIGH if segment == 0 else 1
        )
        head_stop, full_start, full_stop = attention_full_tiles(
            begin_first * REPEAT, begin_last * REPEAT, stop_first * REPEAT, stop_last * REPEAT, ROWS, ROWS
        )
        for part in tl.static_range(3):
            # Without a window all rows after a key see it: no mask is needed at the end.
            if part == 0:
                a, b = begin_first * REPEAT, head_stop if segment == 0 else stop_last * REPEAT
            elif part == 1:
                a, b = full_start, full_stop if LOW > 0 else stop_last * REPEAT
            else:
                a, b = full_stop, stop_last * REPEAT
            if part == 0 or (segment == 0 and (part == 1 or LOW > 0)):
                key = attention_opaque(start, keys + part + 3 * segment) + tl.arange(0, KEYS)
                begin, stop = attention_query_interval(
                    tl.minimum(key, keys - 1),
                    begins,
                    ends,
                    tokens,
                    window,
                    LOW if segment == 0 else 2,
                    HIGH if segment == 0 else 1,
                )
                dk0, dk1, dv0, dv1 = attention_backward_key_tiles(
                    *(
                        (k0, k1, v0, v1),
                        (q_batch, do_batch, lse2 + row, delta + row),
                        (q_strides, do_strides),
                    ),
                    *(tokens, (a + split * ROWS, b, ROWS * splits), begin * REPEAT, stop * REPEAT),
                    *((dk0, dk1, dv0, dv1), scale, factors, (col0, col1)),
                    *(REPEAT, KEY_DIM, VALUE_DIM, K0, K1, V0, V1, DIM_SPLITS, V_IS_K, HAS_CAP),
                    *(WANTS_K, WANTS_V, part != 1, ROWS),
                )
    start = attention_opaque(start, keys)
    out_row = ((split * tl.num_programs(2) + batch) * keys + start) * groups + group
    dk, dv = grads
    row_offs, is_key = tl.arange(0, KEYS) * groups, start + tl.arange(0, KEYS) < keys
    if WANTS_K:
        dk_scale = 1.0 if V_IS_K else scale
        dk_ptrs = dk + out_row * KEY_DIM + row_offs * KEY_DIM
        attention_store(dk_ptrs, dk0 * dk_scale, is_key, col0, K0, KEY_DIM)
        if K1 > 0 and DIM_SPLITS == 1:
            attention_store(dk_ptrs, dk1 * dk_scale, is_key, K0, K1, KEY_DIM)
    if WANTS_V and not V_IS_K:
        dv_ptrs = dv + out_row * VALUE_DIM + row_offs * VALUE_DIM
        attention_store(dv_ptrs, dv0, is_key, 0, V0, VALUE_DIM)
        if V1 > 0:
            attention_store(dv_ptrs, dv1, is_key, V0, V1, VALUE_DIM)
