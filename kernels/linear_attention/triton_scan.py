"""Inter-chunk: the recurrence over chunks in Triton, forwards and backwards, with the state in registers.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
With q' and k' decayed from the chunk's start, x the values or, with the delta rule, beta v_error, where
v_error is v - k' S; h0 and ht are the initial and the final state:

    o = q' S + scores x      S <- kept S + k_ut^T x

One program takes one head of one row and a block of values; chunks follow each other in it. Backwards, with
g the gradient of the outputs and D that of the state:

    d x = scores^T g + k_ut D      D <- kept D + q'^T g - k'^T beta d x
"""

import triton
import triton.language as tl


@triton.jit
def inter_chunk_forward(
    q,
    k,
    v,
    k_ut,
    scores,
    decay_from_start,
    decay_to_end,
    kept,
    beta,
    h0,
    out,
    ht,
    states,
    v_error,
    tokens,
    heads,
    repeat,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    beta_token,
    beta_head,
    block,
    row_head,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_DELTA: tl.constexpr,
    IS_CHANNEL: tl.constexpr,
    IS_OUTPUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """IS_OUTPUT: writes out and end; else what backward needs: states before each chunk, and v - k' S."""
    row, head = (row_head // heads).to(tl.int64), row_head % heads
    t, i = tl.arange(0, CHUNK), tl.arange(0, KEYS)
    c = block * VALUES + tl.arange(0, VALUES)
    is_key, is_value = i < K, c < V
    state_offs = i[:, None] * V + c[None, :]
    is_state = is_key[:, None] & is_value[None, :]
    first, chunks = row * tokens, tl.cdiv(tokens, CHUNK)
    wide = row_head.to(tl.int64) * (K * V)
    if HAS_STATE:
        s = tl.load(h0 + wide + state_offs, mask=is_state, other=0.0)
    else:
        s = tl.zeros([KEYS, VALUES], tl.float32)
    for n in tl.range(0, chunks, num_stages=STAGES):
        start, count = first + n * CHUNK, tokens - n * CHUNK
        is_in = t < count
        is_keys, is_values = is_in[:, None] & is_key[None, :], is_in[:, None] & is_value[None, :]
        own, chunk = start * heads + head, (row * chunks + n) * heads + head
        key = own * K + t[:, None] * (heads * K) + i[None, :]
        narrow = s.to(v.dtype.element_ty)
        v_place = start * v_token + head * v_head + t[:, None] * v_token + c[None, :]
        values = tl.load(v + v_place, mask=is_values, other=0.0)
        if not IS_CHANNEL:
            into = tl.load(decay_from_start + own + t * heads, mask=is_in, other=0.0)
        if not IS_OUTPUT:
            tl.store(states + chunk * (K * V) + state_offs, s.to(states.dtype.element_ty), mask=is_state)
        if IS_DELTA:
            if IS_CHANNEL:
                k_place = key
            else:
                k_place = start * k_token + (head // repeat) * k_head + t[:, None] * k_token + i[None, :]
            recalled = tl.dot(tl.load(k + k_place, mask=is_keys, other=0.0), narrow, input_precision="tf32x3")
            if not IS_CHANNEL:
                recalled *= into[:, None]
            left = values.to(tl.float32) - recalled
            if not IS_OUTPUT:
                r_place = own * V + t[:, None] * (heads * V) + c[None, :]
                tl.store(v_error + r_place, left.to(v_error.dtype.element_ty), mask=is_values)
            rate = tl.load(
                beta + start * beta_token + head * beta_head + t * beta_token, mask=is_in, other=0.0
            )
            x = (left * rate.to(tl.float32)[:, None]).to(values.dtype)
        else:
            x = values
        if IS_OUTPUT:
            if IS_CHANNEL:
                q_place = key
            else:
                q_place = start * q_token + (head // repeat) * q_head + t[:, None] * q_token + i[None, :]
            o = tl.dot(tl.load(q + q_place, mask=is_keys, other=0.0), narrow, input_precision="tf32x3")
            if not IS_CHANNEL:
                o *= into[:, None]
            s_place = own * CHUNK + t[:, None] * (heads * CHUNK) + tl.arange(0, CHUNK)[None, :]
            score = tl.load(scores + s_place, mask=is_in[:, None], other=0.0)
            o = tl.dot(score, x, o, input_precision="tf32x3")
            o_place = own * V + t[:, None] * (heads * V) + c[None, :]
            tl.store(out + o_place, o.to(out.dtype.element_ty), mask=is_values)
        if IS_CHANNEL or IS_DELTA:
            written = tl.load(k_ut + key, mask=is_keys, other=0.0)
        else:
            k_place = start * k_token + (head // repeat) * k_head + t[:, None] * k_token + i[None, :]
            written = tl.load(k + k_place, mask=is_keys, other=0.0)
            left = tl.load(decay_to_end + own + t * heads, mask=is_in, other=0.0)
            x = (x.to(tl.float32) * left[:, None]).to(values.dtype)
        if IS_CHANNEL:
            s *= tl.load(kept + chunk * K + i, mask=is_key, other=0.0)[:, None]
        else:
            s *= tl.load(decay_from_start + own + (tl.minimum(count, CHUNK) - 1) * heads)
        s = tl.dot(tl.trans(written), x, s, input_precision="tf32x3")
    if IS_OUTPUT:
        tl.store(ht + wide + state_offs, s, mask=is_state)


@triton.jit
def inter_chunk_backward(
    q,
    k,
    k_ut,
    scores,
    decay_from_start,
    decay_to_end,
    kept,
    beta,
    grad_out,
    dht,
    grad_x,
    grad_states,
    dh0,
    tokens,
    heads,
    repeat,
    q_token,
    q_head,
    k_token,
    k_head,
    beta_token,
    beta_head,
    block,
    row_head,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_DELTA: tl.constexpr,
    IS_CHANNEL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of x, of the state behind each chunk, and of the first state."""
    row, head = (row_head // heads).to(tl.int64), row_head % heads
    t, i = tl.arange(0, CHUNK), tl.arange(0, KEYS)
    c = block * VALUES + tl.arange(0, VALUES)
    is_key, is_value = i < K, c < V
    state_offs = i[:, None] * V + c[None, :]
    is_state = is_key[:, None] & is_value[None, :]
    first, chunks = row * tokens, tl.cdiv(tokens, CHUNK)
    wide = row_head.to(tl.int64) * (K * V)
    if HAS_END:
        d = tl.load(dht + wide + state_offs, mask=is_state, other=0.0)
    else:
        d = tl.zeros([KEYS, VALUES], tl.float32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        n = chunks - 1 - step
        start, count = first + n * CHUNK, tokens - n * CHUNK
        is_in = t < count
        is_keys, is_values = is_in[:, None] & is_key[None, :], is_in[:, None] & is_value[None, :]
        own, chunk = start * heads + head, (row * chunks + n) * heads + head
        key = own * K + t[:, None] * (heads * K) + i[None, :]
        value = own * V + t[:, None] * (heads * V) + c[None, :]
        tl.store(
            grad_states + chunk * (K * V) + state_offs, d.to(grad_states.dtype.element_ty), mask=is_state
        )
        narrow = d.to(grad_out.dtype.element_ty)
        g = tl.load(grad_out + value, mask=is_values, other=0.0)
        if IS_CHANNEL:
            k_place, q_place = key, key
        else:
            k_place = start * k_token + (head // repeat) * k_head + t[:, None] * k_token + i[None, :]
            q_place = start * q_token + (head // repeat) * q_head + t[:, None] * q_token + i[None, :]
            into = tl.load(decay_from_start + own + t * heads, mask=is_in, other=0.0)
        if IS_CHANNEL or IS_DELTA:
            written = tl.load(k_ut + key, mask=is_keys, other=0.0)
        else:
            written = tl.load(k + k_place, mask=is_keys, other=0.0)
        dx = tl.dot(written, narrow, input_precision="tf32x3")
        if not (IS_CHANNEL or IS_DELTA):
            dx *= tl.load(decay_to_end + own + t * heads, mask=is_in, other=0.0)[:, None]
        s_place = own * CHUNK + t[:, None] * (heads * CHUNK) + tl.arange(0, CHUNK)[None, :]
        score = tl.load(scores + s_place, mask=is_in[:, None], other=0.0)
        dx = tl.dot(tl.trans(score), g, dx, input_precision="tf32x3")
        tl.store(grad_x + value, dx.to(grad_x.dtype.element_ty), mask=is_values)
        if IS_CHANNEL:
            d *= tl.load(kept + chunk * K + i, mask=is_key, other=0.0)[:, None]
        else:
            d *= tl.load(decay_from_start + own + (tl.minimum(count, CHUNK) - 1) * heads)
            g = (g.to(tl.float32) * into[:, None]).to(g.dtype)
        read = tl.load(q + q_place, mask=is_keys, other=0.0)
        d = tl.dot(tl.trans(read), g, d, input_precision="tf32x3")
        if IS_DELTA:
            rate = tl.load(
                beta + start * beta_token + head * beta_head + t * beta_token, mask=is_in, other=0.0
            )
            rate = rate.to(tl.float32)
            if not IS_CHANNEL:
                rate *= into
            erased = tl.load(k + k_place, mask=is_keys, other=0.0)
            d = tl.dot(tl.trans(erased), (dx * -rate[:, None]).to(g.dtype), d, input_precision="tf32x3")
    if HAS_STATE:
        tl.store(dh0 + wide + state_offs, d, mask=is_state)


@triton.jit
def linear_attention_forward(
    q,
    k,
    v,
    k_ut,
    scores,
    decay_from_start,
    decay_to_end,
    kept,
    beta,
    h0,
    out,
    ht,
    tokens,
    heads,
    repeat,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    beta_token,
    beta_head,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_DELTA: tl.constexpr,
    IS_CHANNEL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs and the final state of a block of values of one head."""
    inter_chunk_forward(
        q,
        k,
        v,
        k_ut,
        scores,
        decay_from_start,
        decay_to_end,
        kept,
        beta,
        h0,
        out,
        ht,
        out,
        out,
        tokens,
        heads,
        repeat,
        q_token,
        q_head,
        k_token,
        k_head,
        v_token,
        v_head,
        beta_token,
        beta_head,
        tl.program_id(0),
        tl.program_id(1),
        K,
        V,
        KEYS,
        VALUES,
        CHUNK,
        HAS_STATE,
        IS_DELTA,
        IS_CHANNEL,
        True,
        STAGES,
    )


@triton.jit
def linear_attention_backward_scan(
    q,
    k,
    v,
    k_ut,
    scores,
    decay_from_start,
    decay_to_end,
    kept,
    beta,
    h0,
    states,
    v_error,
    grad_out,
    dht,
    grad_x,
    grad_states,
    dh0,
    tokens,
    heads,
    repeat,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    beta_token,
    beta_head,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_END: tl.constexpr,
    IS_DELTA: tl.constexpr,
    IS_CHANNEL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Half of the programs find the states anew, the other half their gradients; neither needs the other."""
    if tl.program_id(0) % 2 == 0:
        inter_chunk_backward(
            q,
            k,
            k_ut,
            scores,
            decay_from_start,
            decay_to_end,
            kept,
            beta,
            grad_out,
            dht,
            grad_x,
            grad_states,
            dh0,
            tokens,
            heads,
            repeat,
            q_token,
            q_head,
            k_token,
            k_head,
            beta_token,
            beta_head,
            tl.program_id(0) // 2,
            tl.program_id(1),
            K,
            V,
            KEYS,
            VALUES,
            CHUNK,
            HAS_END,
            HAS_STATE,
            IS_DELTA,
            IS_CHANNEL,
            STAGES,
        )
    else:
        inter_chunk_forward(
            q,
            k,
            v,
            k_ut,
            scores,
            decay_from_start,
            decay_to_end,
            kept,
            beta,
            h0,
            v,
            v,
            states,
            v_error,
            tokens,
            heads,
            repeat,
            q_token,
            q_head,
            k_token,
            k_head,
            v_token,
            v_head,
            beta_token,
            beta_head,
            tl.program_id(0) // 2,
            tl.program_id(1),
            K,
            V,
            KEYS,
            VALUES,
            CHUNK,
            HAS_FIRST,
            IS_DELTA,
            IS_CHANNEL,
            False,
            STAGES,
        )
