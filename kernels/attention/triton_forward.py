"""Softmax attention over intervals of keys in Triton: what all its kernels share, and the forward kernel.

Every query sees keys [low, high), and perhaps a second interval of the same or of other keys, under one
softmax; both bounds never fall from one token to the next. FlashAttention-2, arXiv 2307.08691, algorithm 1.

Letters: M rows of a tile, N keys of a tile, R query heads of a key head. The queries of a key head are rows:
row i is token i // R under head i % R, so that a tile reads each key once for all of its heads.
"""

# A kernel called by a kernel does return; its type says otherwise.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Below every score, yet finite, so that the difference of two of them is a number.
LEAST = tl.constexpr(-1.0e30)


@triton.jit
def attention_tile(line, start, WIDTH: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """WIDTH columns from `start` on of the rows at `line`; if PADDED, zero past DIM."""
    column = start + tl.arange(0, WIDTH)
    place = line[:, None] + column[None, :]
    if PADDED:
        tile = tl.load(place, mask=(column < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def attention_starts(half, K0: tl.constexpr, HALVES: tl.constexpr):
    """First columns of the two parts of a key; with two HALVES a program's own one goes first."""
    own = half * K0 if HALVES > 1 else 0
    other = K0 - own
    return own, other


@triton.jit
def attention_product(a0, a1, b0, b1, HAS_SECOND: tl.constexpr):
    """Products of all rows of a with all rows of b, over one or two parts of the columns."""
    out = tl.dot(a0, tl.trans(b0), input_precision="tf32x3")
    if HAS_SECOND:
        out = tl.dot(a1, tl.trans(b1), out, input_precision="tf32x3")
    return out


@triton.jit
def attention_capped(score, inner, cap):
    """cap tanh(score inner / 2) for the factor `inner` that belongs to powers of two."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(score * inner))


@triton.jit
def attention_rows(tile, tokens, REPEAT: tl.constexpr, ROWS: tl.constexpr):
    """Tokens of the first and of the last row of a tile; of each row how many tokens it is past the first,
    its head, and whether it exists.

    The last token stands in for those that do not. Offsets from the first row fit in 32 bits.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    first = tile * ROWS // REPEAT
    last = tl.minimum((tile * ROWS + ROWS - 1) // REPEAT, tokens - 1)
    mtp = tl.minimum(row // REPEAT, tokens - 1) - first
    return first, last, mtp, row % REPEAT, row < tokens * REPEAT


@triton.jit
def attention_again(number, bound):
    """The same number, which is below the bound; the compiler cannot tell.

    What follows from it is then computed where it is used, and waits in no register through the loops before.
    """
    return tl.minimum(number, bound)


@triton.jit
def attention_tokens(tile, use, tokens, REPEAT: tl.constexpr, ROWS: tl.constexpr):
    """The token of each row, computed anew for each `use`."""
    first, _, mtp, _, _ = attention_rows(attention_again(tile, tokens * REPEAT + use), tokens, REPEAT, ROWS)
    return first + mtp


@triton.jit
def attention_interval(token, low, high, window, LOW: tl.constexpr, HIGH: tl.constexpr):
    """First key that a query sees, and the one after its last; of a block of tokens or of one.

    LOW: 0 for all keys from the first on, 1 for the last `window`, 2 as loaded. HIGH: 0 for up to the token
    itself, 1 as loaded.
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
def attention_stretches(
    begin_first, begin_last, stop_first, stop_last, EDGE: tl.constexpr, SIZE: tl.constexpr
):
    """Where keys from `begin_first` on need no mask any more, and where they need one again.

    Tiles are of SIZE between the two and of EDGE outside. The bounds are those of the first and of the last
    row: none of [begin_first, stop_last) is left out.
    """
    whole = begin_first + tl.cdiv(begin_last - begin_first, EDGE) * EDGE
    ragged = whole + tl.maximum(stop_first - whole, 0) // SIZE * SIZE
    return tl.minimum(whole, stop_last), whole, ragged


@triton.jit
def attention_forward_tiles(
    q0,
    q1,
    k,
    v,
    k_token,
    v_token,
    keys,
    begin,
    stop,
    low,
    high,
    top,
    total,
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
    VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Goes over the keys from `begin` on: highest score, total weight and weighted values so far."""
    offset = tl.arange(0, KEYS)
    for start in range(begin, stop, KEYS):
        key = start + offset
        step = offset
        if MASKED:
            # Past the end the last key stands in; no query sees it there.
            step = tl.minimum(offset, keys - 1 - start)
        # Offsets within a tile fit in 32 bits, which halves the registers that they take.
        line = k + start * tl.cast(k_token, tl.int64) + step * k_token
        k0 = attention_tile(line, own, K0, KEY_DIM, K0 + K1 > KEY_DIM)
        k1 = k0
        if K1 > 0:
            k1 = attention_tile(line, other, K1, KEY_DIM, K0 + K1 > KEY_DIM)
        score = attention_product(q0, q1, k0, k1, K1 > 0)
        if CAPPED:
            score = attention_capped(score, inner, cap)
        if MASKED:
            is_seen = key[None, :] < high[:, None]
            if LOW > 0:
                is_seen = is_seen & (key[None, :] >= low[:, None])
            score = tl.where(is_seen, score, float("-inf"))
        peak = tl.maximum(top, tl.max(score, axis=1))
        scaled = peak * factor
        weight = tl.exp2(score * factor - scaled[:, None])
        fade = tl.exp2(top * factor - scaled)
        total = total * fade + tl.sum(weight, axis=1)
        top = peak
        if VALUES:
            acc0 = acc0 * fade[:, None]
            if SAME:
                v0, v1 = k0, k1
            else:
                line = v + start * tl.cast(v_token, tl.int64) + step * v_token
                v0 = attention_tile(line, 0, V0, VALUE_DIM, V0 + V1 > VALUE_DIM)
                v1 = v0
                if V1 > 0:
                    v1 = attention_tile(line, V0, V1, VALUE_DIM, V0 + V1 > VALUE_DIM)
            weight = weight.to(v0.dtype)
            acc0 = tl.dot(weight, v0, acc0, input_precision="tf32x3")
            if V1 > 0 and HALVES == 1:
                acc1 = tl.dot(weight, v1, acc1 * fade[:, None], input_precision="tf32x3")
    return top, total, acc0, acc1


@triton.jit
def attention_forward_segment(
    q0,
    q1,
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
    top,
    total,
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
    VALUES: tl.constexpr,
    IS_FAR: tl.constexpr,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One interval of keys for tokens from `first` to `last`; masks only the tiles at its two ends.

    A far interval is short: all its tiles are masked, in one loop.
    """
    begin_first, stop_first = attention_interval(first, low, high, window, LOW, HIGH)
    begin_last, stop_last = attention_interval(last, low, high, window, LOW, HIGH)
    opening, whole, ragged = attention_stretches(begin_first, begin_last, stop_first, stop_last, EDGE, KEYS)
    for part in tl.static_range(3):
        # The opening, the middle without masks, and the end.
        if part == 0:
            a, b = begin_first, stop_last if IS_FAR else opening
        elif part == 1:
            a, b = whole, ragged
        else:
            a, b = ragged, stop_last
        if (part == 0 and LOW > 0) or (part > 0 and not IS_FAR):
            token = attention_tokens(tile, part + 3 * IS_FAR, tokens, REPEAT, ROWS)
            begin, stop = attention_interval(token, low, high, window, LOW, HIGH)
            top, total, acc0, acc1 = attention_forward_tiles(
                q0,
                q1,
                k,
                v,
                k_token,
                v_token,
                keys,
                a,
                b,
                begin,
                stop,
                top,
                total,
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
                VALUES,
                part != 1,
                KEYS if part == 1 else EDGE,
            )
    return top, total, acc0, acc1


@triton.jit
def attention_forward(
    q,
    k,
    v,
    far_k,
    far_v,
    low,
    high,
    far_low,
    far_high,
    sinks,
    out,
    lse,
    q_at,
    k_at,
    v_at,
    far_k_at,
    far_v_at,
    tokens,
    keys,
    far_keys,
    window,
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
    SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """ROWS rows of one key head: outputs and log-sum-exp."""
    # The last tiles see the most keys: they go first, and short ones fill up the end.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HALVES
    half = tl.program_id(0) % HALVES
    own, other = attention_starts(half, K0, HALVES)
    group, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    groups = tl.num_programs(1)
    first, last, mtp, head, is_row = attention_rows(tile, tokens, REPEAT, ROWS)
    place = q + line * q_at[0] + group * REPEAT * q_at[2] + first * tl.cast(q_at[1], tl.int64)
    place = place + (mtp * q_at[1] + head * q_at[2])
    q0 = attention_tile(place, own, K0, KEY_DIM, K0 + K1 > KEY_DIM)
    q1 = q0
    if K1 > 0:
        q1 = attention_tile(place, other, K1, KEY_DIM, K0 + K1 > KEY_DIM)
    top = tl.full([ROWS], LEAST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, V0], tl.float32)
    acc1 = tl.zeros([ROWS, V1 if V1 > 0 and HALVES == 1 else 1], tl.float32)
    top, total, acc0, acc1 = attention_forward_segment(
        q0,
        q1,
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
        top,
        total,
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
        VALUES,
        False,
        REPEAT,
        ROWS,
        KEYS,
        EDGE,
    )
    if FAR:
        top, total, acc0, acc1 = attention_forward_segment(
            q0,
            q1,
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
            top,
            total,
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
            VALUES,
            True,
            REPEAT,
            ROWS,
            KEYS,
            EDGE,
        )
    tile = attention_again(tile, tokens * REPEAT)
    first, _, mtp, head, is_row = attention_rows(tile, tokens, REPEAT, ROWS)
    peak = top * factor
    fade = tl.full([ROWS], 1.0, tl.float32)
    if SINKS:
        # At the end and not as the first score: a far sink then rounds no weight.
        sink = tl.load(sinks + group * REPEAT + head).to(tl.float32) * LOG2E
        both = tl.maximum(peak, sink)
        fade = tl.exp2(peak - both)
        total = total * fade + tl.exp2(sink - both)
        peak = both
    is_seen = total > 0
    total = tl.where(is_seen, total, 1.0)
    wide = tl.where(is_seen, (peak + tl.log2(total)) / LOG2E, float("-inf"))
    index = ((line * tokens + first) * groups + group) * REPEAT
    step = mtp * (groups * REPEAT) + head
    tl.store(lse + index + step, wide, mask=is_row & (half == 0))
    if VALUES:
        share = tl.where(is_seen, fade / total, 0.0)
        place = out + index * VALUE_DIM + step * VALUE_DIM
        attention_store(place, acc0 * share[:, None], is_row, own, V0, VALUE_DIM)
        if V1 > 0 and HALVES == 1:
            attention_store(place, acc1 * share[:, None], is_row, V0, V1, VALUE_DIM)


@triton.jit
def attention_store(line, tile, is_in, start, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Writes columns from `start` on of the rows at `line`, where is_in and inside DIM."""
    column = start + tl.arange(0, WIDTH)
    inside = is_in[:, None] & (column < DIM)[None, :]
    tl.store(line[:, None] + column[None, :], tile.to(line.dtype.element_ty), mask=inside)
