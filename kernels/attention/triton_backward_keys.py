"""Gradients of keys and values of attention in Triton: a tile of keys goes over the rows that see it.

The rows that see a key are an interval, too. Letters as in the forward kernel, formulas as for the queries.
"""

# A kernel called by a kernel does return; its type says otherwise.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.attention.triton_forward import (
    attention_again,
    attention_capped,
    attention_product,
    attention_starts,
    attention_store,
    attention_stretches,
    attention_tile,
)


@triton.jit
def attention_readers(key, first, end, tokens, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    """First query that sees a key, and the one after its last; flags as in attention_interval."""
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
    k0,
    k1,
    v0,
    v1,
    q,
    grad,
    scaled,
    deltas,
    q_at,
    grad_at,
    tokens,
    begin,
    stop,
    step,
    first,
    end,
    dk0,
    dk1,
    dv0,
    dv1,
    scale,
    factor,
    inner,
    cap,
    own,
    other,
    REPEAT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    HALVES: tl.constexpr,
    SAME: tl.constexpr,
    CAPPED: tl.constexpr,
    WANTS_K: tl.constexpr,
    WANTS_V: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Goes over rows from `begin` on: gradients of the keys and values so far."""
    for start in range(begin, stop, step):
        row = start + tl.arange(0, ROWS)
        token = start // REPEAT
        if ROWS % REPEAT == 0:
            # `begin` and the step are whole tokens.
            mtp, head = tl.arange(0, ROWS) // REPEAT, tl.arange(0, ROWS) % REPEAT
        else:
            mtp, head = row // REPEAT - token, row % REPEAT
        # Past the end the last token stands in, with weights of zero.
        mtp = tl.minimum(mtp, tokens - 1 - token)
        line = q + token * tl.cast(q_at[1], tl.int64) + (mtp * q_at[1] + head * q_at[2])
        q0 = attention_tile(line, own, K0, KEY_DIM, K0 + K1 > KEY_DIM)
        q1 = q0
        if K1 > 0:
            q1 = attention_tile(line, other, K1, KEY_DIM, K0 + K1 > KEY_DIM)
        line = grad + token * tl.cast(grad_at[1], tl.int64) + (mtp * grad_at[1] + head * grad_at[2])
        g0 = attention_tile(line, own, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
        g1 = g0
        if V1 > 0:
            g1 = attention_tile(line, V0 - own, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
        lse = tl.load(scaled + row)
        score = attention_product(k0, k1, q0, q1, K1 > 0)
        if CAPPED:
            score = attention_capped(score, inner, cap)
            share = score / cap
        if MASKED:
            is_seen = (row[None, :] >= first[:, None]) & (row[None, :] < end[:, None])
            score = tl.where(is_seen, score, float("-inf"))
        weight = tl.exp2(score * factor - lse[None, :])
        if WANTS_V:
            narrow = weight.to(g0.dtype)
            if SAME:
                dk0 = tl.dot(narrow, g0, dk0, input_precision="tf32x3")
                if K1 > 0 and HALVES == 1:
                    dk1 = tl.dot(narrow, g1, dk1, input_precision="tf32x3")
            else:
                dv0 = tl.dot(narrow, g0, dv0, input_precision="tf32x3")
                if V1 > 0:
                    dv1 = tl.dot(narrow, g1, dv1, input_precision="tf32x3")
        if WANTS_K:
            pull = attention_product(v0, v1, g0, g1, V1 > 0) - tl.load(deltas + row)[None, :]
            pull = weight * pull
            if CAPPED:
                pull = pull * (1.0 - share * share)
            if SAME:
                # The gradients as a value stand in the same sum, which no factor follows.
                pull = pull * scale
            pull = pull.to(q0.dtype)
            dk0 = tl.dot(pull, q0, dk0, input_precision="tf32x3")
            if K1 > 0 and HALVES == 1:
                dk1 = tl.dot(pull, q1, dk1, input_precision="tf32x3")
    return dk0, dk1, dv0, dv1


@triton.jit
def attention_backward_keys(
    q,
    k,
    v,
    first,
    end,
    far_first,
    far_end,
    grad,
    scaled,
    deltas,
    grad_k,
    grad_v,
    q_at,
    k_at,
    v_at,
    grad_at,
    tokens,
    length,
    keys,
    splits,
    window,
    scale,
    factor,
    inner,
    cap,
    REPEAT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    HALVES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FAR: tl.constexpr,
    SAME: tl.constexpr,
    CAPPED: tl.constexpr,
    WANTS_K: tl.constexpr,
    WANTS_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """KEYS keys of one key head over every splits-th tile of rows: gradients of keys and of values."""
    own, other = attention_starts(tl.program_id(0) % HALVES, K0, HALVES)
    split, tile = tl.program_id(0) // HALVES % splits, tl.program_id(0) // HALVES // splits
    group, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    start = tile * KEYS
    step = tl.minimum(tl.arange(0, KEYS), keys - 1 - start)
    place = k + line * k_at[0] + group * k_at[2] + start * tl.cast(k_at[1], tl.int64) + step * k_at[1]
    k0 = attention_tile(place, own, K0, KEY_DIM, K0 + K1 > KEY_DIM)
    k1 = k0
    if K1 > 0:
        k1 = attention_tile(place, other, K1, KEY_DIM, K0 + K1 > KEY_DIM)
    v0, v1 = k0, k1
    if WANTS_K and not SAME:
        place = v + line * v_at[0] + group * v_at[2] + start * tl.cast(v_at[1], tl.int64) + step * v_at[1]
        v0 = attention_tile(place, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
        v1 = v0
        if V1 > 0:
            v1 = attention_tile(place, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
    dk0 = tl.zeros([KEYS, K0 if WANTS_K else 1], tl.float32)
    dk1 = tl.zeros([KEYS, K1 if WANTS_K and K1 > 0 and HALVES == 1 else 1], tl.float32)
    dv0 = tl.zeros([KEYS, V0 if WANTS_V and not SAME else 1], tl.float32)
    dv1 = tl.zeros([KEYS, V1 if WANTS_V and not SAME and V1 > 0 else 1], tl.float32)
    own_q = q + line * q_at[0] + group * REPEAT * q_at[2]
    own_grad = grad + line * grad_at[0] + group * REPEAT * grad_at[2]
    at = (line * groups + group) * length
    last = tl.minimum(start + KEYS, keys) - 1
    for segment in tl.static_range(2 if FAR else 1):
        if segment == 0:
            begins = first + line * keys if HIGH == 1 else first
            ends = end + line * keys if LOW == 2 else end
        else:
            begins, ends = far_first + line * keys, far_end + line * keys
        begin_first, stop_first = attention_readers(
            start, begins, ends, tokens, window, LOW if segment == 0 else 2, HIGH if segment == 0 else 1
        )
        begin_last, stop_last = attention_readers(
            last, begins, ends, tokens, window, LOW if segment == 0 else 2, HIGH if segment == 0 else 1
        )
        opening, whole, ragged = attention_stretches(
            begin_first * REPEAT, begin_last * REPEAT, stop_first * REPEAT, stop_last * REPEAT, ROWS, ROWS
        )
        for part in tl.static_range(3):
            # Without a window all keys have readers up to the last row: no mask is needed at the end.
            if part == 0:
                a, b = begin_first * REPEAT, opening if segment == 0 else stop_last * REPEAT
            elif part == 1:
                a, b = whole, ragged if LOW > 0 else stop_last * REPEAT
            else:
                a, b = ragged, stop_last * REPEAT
            if part == 0 or (segment == 0 and (part == 1 or LOW > 0)):
                key = attention_again(start, keys + part + 3 * segment) + tl.arange(0, KEYS)
                begin, stop = attention_readers(
                    tl.minimum(key, keys - 1),
                    begins,
                    ends,
                    tokens,
                    window,
                    LOW if segment == 0 else 2,
                    HIGH if segment == 0 else 1,
                )
                dk0, dk1, dv0, dv1 = attention_backward_key_tiles(
                    k0,
                    k1,
                    v0,
                    v1,
                    own_q,
                    own_grad,
                    scaled + at,
                    deltas + at,
                    q_at,
                    grad_at,
                    tokens,
                    a + split * ROWS,
                    b,
                    ROWS * splits,
                    begin * REPEAT,
                    stop * REPEAT,
                    dk0,
                    dk1,
                    dv0,
                    dv1,
                    scale,
                    factor,
                    inner,
                    cap,
                    own,
                    other,
                    REPEAT,
                    KEY_DIM,
                    VALUE_DIM,
                    K0,
                    K1,
                    V0,
                    V1,
                    HALVES,
                    SAME,
                    CAPPED,
                    WANTS_K,
                    WANTS_V,
                    part != 1,
                    ROWS,
                )
    start = attention_again(start, keys)
    index = ((split * tl.num_programs(2) + line) * keys + start) * groups + group
    step, is_key = tl.arange(0, KEYS) * groups, start + tl.arange(0, KEYS) < keys
    if WANTS_K:
        weight = 1.0 if SAME else scale
        place = grad_k + index * KEY_DIM + step * KEY_DIM
        attention_store(place, dk0 * weight, is_key, own, K0, KEY_DIM)
        if K1 > 0 and HALVES == 1:
            attention_store(place, dk1 * weight, is_key, K0, K1, KEY_DIM)
    if WANTS_V and not SAME:
        place = grad_v + index * VALUE_DIM + step * VALUE_DIM
        attention_store(place, dv0, is_key, 0, V0, VALUE_DIM)
        if V1 > 0:
            attention_store(place, dv1, is_key, V0, V1, VALUE_DIM)
