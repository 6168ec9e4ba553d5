"""Gradients of softmax attention over intervals of keys in Triton; letters as in the forward kernel.

With weights p, incoming gradients g and dp = g v: a score gets ds = p (dp - delta), where delta is g out less
the gradient of the log-sum-exp. One kernel goes over keys for the gradients of queries, one over rows for
those of keys and values; both compute the scores again and neither adds to memory that others write.
"""

# A kernel called by a kernel does return; its type says otherwise.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.attention.triton_forward import (
    LOG2E,
    attention_again,
    attention_capped,
    attention_interval,
    attention_product,
    attention_rows,
    attention_starts,
    attention_store,
    attention_stretches,
    attention_tile,
    attention_tokens,
)


@triton.jit
def attention_backward_rows(
    out,
    grad,
    lse,
    grad_lse,
    scaled,
    delta,
    grad_at,
    tokens,
    length,
    REPEAT: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """For ROWS of the `length` rows of a key head: delta, and the log-sum-exp for powers of two.

    The latter is infinite for a row that sees no key and for rows past the last: all weights are zero there.
    """
    group, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < tokens * REPEAT
    token = tl.minimum(row // REPEAT, tokens - 1).to(tl.int64)
    head = group * REPEAT + row % REPEAT
    index = (line * tokens + token) * (groups * REPEAT) + head
    found = tl.zeros([ROWS], tl.float32)
    if HAS_GRAD:
        place = grad + line * grad_at[0] + token * grad_at[1] + head * grad_at[2]
        mixed = attention_tile(out + index * VALUE_DIM, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM).to(tl.float32)
        found += tl.sum(
            mixed * attention_tile(place, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM).to(tl.float32), axis=1
        )
        if V1 > 0:
            mixed = attention_tile(out + index * VALUE_DIM, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM).to(
                tl.float32
            )
            pull = attention_tile(place, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM).to(tl.float32)
            found += tl.sum(mixed * pull, axis=1)
    if HAS_GRAD_LSE:
        found -= tl.load(grad_lse + index)
    wide = tl.load(lse + index)
    wide = tl.where(is_row & (wide > float("-inf")), wide * LOG2E, float("inf"))
    place = (line * groups + group) * length + row
    tl.store(scaled + place, wide, mask=row < length)
    tl.store(delta + place, found, mask=row < length)


@triton.jit
def attention_backward_query_tiles(
    q0,
    q1,
    g0,
    g1,
    k,
    v,
    k_token,
    v_token,
    keys,
    begin,
    stop,
    low,
    high,
    lse,
    delta,
    acc0,
    acc1,
    factor,
    inner,
    cap,
    own,
    other,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    HALVES: tl.constexpr,
    LOW: tl.constexpr,
    SAME: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Goes over the keys from `begin` on: gradients of the rows so far, but for the scale."""
    offset = tl.arange(0, KEYS)
    for start in range(begin, stop, KEYS):
        key = start + offset
        step = offset
        if MASKED:
            step = tl.minimum(offset, keys - 1 - start)
        line = k + start * tl.cast(k_token, tl.int64) + step * k_token
        k0 = attention_tile(line, own, K0, KEY_DIM, K0 + K1 > KEY_DIM)
        k1 = k0
        if K1 > 0:
            k1 = attention_tile(line, other, K1, KEY_DIM, K0 + K1 > KEY_DIM)
        if SAME:
            v0, v1 = k0, k1
        else:
            line = v + start * tl.cast(v_token, tl.int64) + step * v_token
            v0 = attention_tile(line, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
            v1 = v0
            if V1 > 0:
                v1 = attention_tile(line, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
        score = attention_product(q0, q1, k0, k1, K1 > 0)
        if CAPPED:
            score = attention_capped(score, inner, cap)
            share = score / cap
        if MASKED:
            is_seen = key[None, :] < high[:, None]
            if LOW > 0:
                is_seen = is_seen & (key[None, :] >= low[:, None])
            score = tl.where(is_seen, score, float("-inf"))
        weight = tl.exp2(score * factor - lse[:, None])
        pull = weight * (attention_product(g0, g1, v0, v1, V1 > 0) - delta[:, None])
        if CAPPED:
            pull = pull * (1.0 - share * share)
        pull = pull.to(k0.dtype)
        acc0 = tl.dot(pull, k0, acc0, input_precision="tf32x3")
        if K1 > 0 and HALVES == 1:
            acc1 = tl.dot(pull, k1, acc1, input_precision="tf32x3")
    return acc0, acc1


@triton.jit
def attention_backward_query_segment(
    q0,
    q1,
    g0,
    g1,
    k,
    v,
    k_token,
    v_token,
    keys,
    tile,
    tokens,
    first,
    last,
    low,
    high,
    window,
    lse,
    delta,
    acc0,
    acc1,
    factor,
    inner,
    cap,
    own,
    other,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    HALVES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SAME: tl.constexpr,
    CAPPED: tl.constexpr,
    IS_FAR: tl.constexpr,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One interval of keys for tokens from `first` to `last`; parts as in the forward kernel."""
    begin_first, stop_first = attention_interval(first, low, high, window, LOW, HIGH)
    begin_last, stop_last = attention_interval(last, low, high, window, LOW, HIGH)
    opening, whole, ragged = attention_stretches(begin_first, begin_last, stop_first, stop_last, KEYS, KEYS)
    for part in tl.static_range(3):
        if part == 0:
            a, b = begin_first, stop_last if IS_FAR else opening
        elif part == 1:
            a, b = whole, ragged
        else:
            a, b = ragged, stop_last
        if (part == 0 and LOW > 0) or (part > 0 and not IS_FAR):
            token = attention_tokens(tile, part + 3 * IS_FAR, tokens, REPEAT, ROWS)
            begin, stop = attention_interval(token, low, high, window, LOW, HIGH)
            acc0, acc1 = attention_backward_query_tiles(
                q0,
                q1,
                g0,
                g1,
                k,
                v,
                k_token,
                v_token,
                keys,
                a,
                b,
                begin,
                stop,
                lse,
                delta,
                acc0,
                acc1,
                factor,
                inner,
                cap,
                own,
                other,
                KEY_DIM,
                VALUE_DIM,
                K0,
                K1,
                V0,
                V1,
                HALVES,
                LOW,
                SAME,
                CAPPED,
                part != 1,
                KEYS,
            )
    return acc0, acc1


@triton.jit
def attention_backward_queries(
    q,
    k,
    v,
    far_k,
    far_v,
    low,
    high,
    far_low,
    far_high,
    grad,
    scaled,
    deltas,
    grad_q,
    q_at,
    k_at,
    v_at,
    far_k_at,
    far_v_at,
    grad_at,
    tokens,
    length,
    keys,
    far_keys,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """ROWS rows of one key head: gradients of the queries."""
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HALVES
    own, other = attention_starts(tl.program_id(0) % HALVES, K0, HALVES)
    group, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    first, last, mtp, head, is_row = attention_rows(tile, tokens, REPEAT, ROWS)
    place = q + line * q_at[0] + group * REPEAT * q_at[2] + first * tl.cast(q_at[1], tl.int64)
    place = place + (mtp * q_at[1] + head * q_at[2])
    q0 = attention_tile(place, own, K0, KEY_DIM, K0 + K1 > KEY_DIM)
    q1 = q0
    if K1 > 0:
        q1 = attention_tile(place, other, K1, KEY_DIM, K0 + K1 > KEY_DIM)
    place = grad + line * grad_at[0] + group * REPEAT * grad_at[2] + first * tl.cast(grad_at[1], tl.int64)
    place = place + (mtp * grad_at[1] + head * grad_at[2])
    g0 = attention_tile(place, own, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
    g1 = g0
    if V1 > 0:
        g1 = attention_tile(place, V0 - own, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
    # Rows past the last may be past the end of these, too.
    index = (line * groups + group) * length + first * REPEAT
    step = mtp * REPEAT + head
    lse = tl.load(scaled + index + step)
    delta = tl.load(deltas + index + step)
    acc0 = tl.zeros([ROWS, K0], tl.float32)
    acc1 = tl.zeros([ROWS, K1 if K1 > 0 and HALVES == 1 else 1], tl.float32)
    acc0, acc1 = attention_backward_query_segment(
        q0,
        q1,
        g0,
        g1,
        k + line * k_at[0] + group * k_at[2],
        v + line * v_at[0] + group * v_at[2],
        k_at[1],
        v_at[1],
        keys,
        tile,
        tokens,
        first,
        last,
        low + line * tokens if LOW == 2 else low,
        high + line * tokens if HIGH == 1 else high,
        window,
        lse,
        delta,
        acc0,
        acc1,
        factor,
        inner,
        cap,
        own,
        other,
        KEY_DIM,
        VALUE_DIM,
        K0,
        K1,
        V0,
        V1,
        HALVES,
        LOW,
        HIGH,
        SAME,
        CAPPED,
        False,
        REPEAT,
        ROWS,
        KEYS,
    )
    if FAR:
        acc0, acc1 = attention_backward_query_segment(
            q0,
            q1,
            g0,
            g1,
            far_k + line * far_k_at[0] + group * far_k_at[2],
            far_v + line * far_v_at[0] + group * far_v_at[2],
            far_k_at[1],
            far_v_at[1],
            far_keys,
            tile,
            tokens,
            first,
            last,
            far_low + line * tokens,
            far_high + line * tokens,
            window,
            lse,
            delta,
            acc0,
            acc1,
            factor,
            inner,
            cap,
            own,
            other,
            KEY_DIM,
            VALUE_DIM,
            K0,
            K1,
            V0,
            V1,
            HALVES,
            2,
            1,
            SAME,
            CAPPED,
            True,
            REPEAT,
            ROWS,
            KEYS,
        )
    tile = attention_again(tile, tokens * REPEAT)
    first, _, mtp, head, is_row = attention_rows(tile, tokens, REPEAT, ROWS)
    index = ((line * tokens + first) * groups + group) * REPEAT
    place = grad_q + index * KEY_DIM + (mtp * (groups * REPEAT) + head) * KEY_DIM
    attention_store(place, acc0 * scale, is_row, own, K0, KEY_DIM)
    if K1 > 0 and HALVES == 1:
        attention_store(place, acc1 * scale, is_row, K0, K1, KEY_DIM)
