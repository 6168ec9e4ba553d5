"""Inter-chunk of the delta rule in Triton, forwards and backwards, with the state in registers.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
With q' and k' decayed from the chunk's start, and x beta times v_error, which is v - k' S; h0 and ht are the
initial and the final state:

    o = q' S + scores x      S <- kept S + k_ut^T x

One program takes one head of one row and a block of values; chunks follow each other in it. Backwards, with
g the gradient of the outputs and D that of the state:

    d x = scores^T g + k_ut D      D <- kept D + q'^T g - k'^T beta d x

Decays per channel are in q and k already; those per head are taken here.
"""

import triton
import triton.language as tl

from kernels.delta_rule.triton_solve import load_rates
from kernels.linear_attention.triton_chunks import dense, load_tile, moved, store_tile
from kernels.linear_attention.triton_state import kept_of, load_scores, load_state, store_state


@triton.jit
def delta_rule_forward(
    intra,
    v,
    beta,
    h0,
    out,
    ht,
    states,
    v_error,
    sizes,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_CHANNEL: tl.constexpr,
    IS_OUTPUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """IS_OUTPUT: writes outputs and the final state; else the states before each chunk, and v_error."""
    tokens, chunks, heads, repeat = sizes
    own_state, head = tl.program_id(1).to(tl.int64), tl.program_id(1) % heads
    row = (tl.program_id(1) // heads).to(tl.int64)
    t, i, c = (
        tl.arange(0, CHUNK),
        tl.arange(0, KEYS),
        tl.program_id(0) // (1 if IS_OUTPUT else 2) * VALUES + tl.arange(0, VALUES),
    )
    s = load_state(h0, own_state, i, c, K, V, HAS_STATE)
    for n in tl.range(0, chunks, num_stages=STAGES):
        start, count = row * tokens + n * CHUNK, tokens - n * CHUNK
        own, chunk, is_in = start * heads + head, (row * chunks + n) * heads + head, t < count
        is_keys, is_values = is_in[:, None] & (i < K)[None, :], is_in[:, None] & (c < V)[None, :]
        values = load_tile(moved(v, start, head), 0, t, c, is_values)
        narrow = s.to(values.dtype)
        key = load_tile(moved(intra.k, start, head // repeat), 0, t, i, is_keys)
        recalled = tl.dot(key, narrow, input_precision="tf32x3")
        if not IS_CHANNEL:
            into = tl.load(intra.decays.from_start + own + t * heads, mask=is_in, other=0.0)
            recalled *= into[:, None]
        error = values.to(tl.float32) - recalled
        x = (error * load_rates(beta, start, head, t, is_in)[:, None]).to(values.dtype)
        if IS_OUTPUT:
            query = load_tile(moved(intra.q, start, head // repeat), 0, t, i, is_keys)
            o = tl.dot(query, narrow, input_precision="tf32x3")
            if not IS_CHANNEL:
                o *= into[:, None]
            score = load_scores(intra.scores, start, head, heads, count, CHUNK)
            o = tl.dot(score, x, o, input_precision="tf32x3")
            store_tile(dense(out, start, head, heads, V), 0, t, c, o, is_values)
        else:
            store_state(states, chunk, i, c, s, K, V)
            store_tile(dense(v_error, start, head, heads, V), 0, t, c, error, is_values)
        k_ut = load_tile(dense(intra.k_ut, start, head, heads, K), 0, t, i, is_keys)
        s = kept_of(s, intra.decays, own, chunk, count, heads, i, K, CHUNK, IS_CHANNEL)
        s = tl.dot(tl.trans(k_ut), x, s, input_precision="tf32x3")
    if IS_OUTPUT:
        store_state(ht, own_state, i, c, s, K, V)


@triton.jit
def inter_chunk_backward(
    intra,
    inter,
    beta,
    dht,
    dh0,
    sizes,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_CHANNEL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of x, of the state behind each chunk, and of the first state."""
    tokens, chunks, heads, repeat = sizes
    own_state, head = tl.program_id(1).to(tl.int64), tl.program_id(1) % heads
    row = (tl.program_id(1) // heads).to(tl.int64)
    t, i, c = tl.arange(0, CHUNK), tl.arange(0, KEYS), tl.program_id(0) // 2 * VALUES + tl.arange(0, VALUES)
    d = load_state(dht, own_state, i, c, K, V, HAS_END)
    for step in tl.range(0, chunks, num_stages=STAGES):
        n = chunks - 1 - step
        start, count = row * tokens + n * CHUNK, tokens - n * CHUNK
        own, chunk, is_in = start * heads + head, (row * chunks + n) * heads + head, t < count
        is_keys, is_values = is_in[:, None] & (i < K)[None, :], is_in[:, None] & (c < V)[None, :]
        store_state(inter.grad_states, chunk, i, c, d, K, V)
        g = load_tile(dense(inter.grad_out, start, head, heads, V), 0, t, c, is_values)
        k_ut = load_tile(dense(intra.k_ut, start, head, heads, K), 0, t, i, is_keys)
        dx = tl.dot(k_ut, d.to(g.dtype), input_precision="tf32x3")
        score = load_scores(intra.scores, start, head, heads, count, CHUNK)
        dx = tl.dot(tl.trans(score), g, dx, input_precision="tf32x3")
        store_tile(dense(inter.grad_x, start, head, heads, V), 0, t, c, dx, is_values)
        d = kept_of(d, intra.decays, own, chunk, count, heads, i, K, CHUNK, IS_CHANNEL)
        rate = load_rates(beta, start, head, t, is_in)
        if not IS_CHANNEL:
            into = tl.load(intra.decays.from_start + own + t * heads, mask=is_in, other=0.0)
            g = (g.to(tl.float32) * into[:, None]).to(g.dtype)
            rate *= into
        query = load_tile(moved(intra.q, start, head // repeat), 0, t, i, is_keys)
        d = tl.dot(tl.trans(query), g, d, input_precision="tf32x3")
        key = load_tile(moved(intra.k, start, head // repeat), 0, t, i, is_keys)
        d = tl.dot(tl.trans(key), (dx * -rate[:, None]).to(g.dtype), d, input_precision="tf32x3")
    if HAS_STATE:
        store_state(dh0, own_state, i, c, d, K, V)


@triton.jit
def delta_rule_backward_scan(
    intra,
    inter,
    v,
    beta,
    h0,
    v_error,
    dht,
    dh0,
    sizes,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_END: tl.constexpr,
    IS_CHANNEL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Half of the programs find the states anew, the other half their gradients; neither needs the other."""
    if tl.program_id(0) % 2 == 0:
        inter_chunk_backward(
            *(intra, inter, beta, dht, dh0, sizes),
            *(K, V, KEYS, VALUES, CHUNK, HAS_END, HAS_STATE, IS_CHANNEL, STAGES),
        )
    else:
        delta_rule_forward(
            *(intra, v, beta, h0, None, None, inter.states, v_error, sizes),
            *(K, V, KEYS, VALUES, CHUNK, HAS_FIRST, IS_CHANNEL, False, STAGES),
        )
