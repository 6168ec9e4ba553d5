"""Inter-chunk: the recurrence over chunks in Triton, forwards and backwards, with the state in registers.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
With q' decayed from the chunk's start and k' to its end; h0 and ht are the initial and the final state:

    o = q' S + scores v      S <- kept S + k'^T v

One program takes one head of one row and a block of values; chunks follow each other in it. Backwards, with
g the gradient of the outputs and D that of the state:

    d v = scores^T g + k' D      D <- kept D + q'^T g

Decays per channel are in q and k already; those per head are taken here.
"""

import triton
import triton.language as tl

from kernels.linear_attention.triton_chunks import dense, load_tile, moved, store_tile
from kernels.linear_attention.triton_state import kept_of, load_scores, load_state, store_state


@triton.jit
def linear_attention_forward(
    intra,
    v,
    h0,
    out,
    ht,
    states,
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
    """IS_OUTPUT: writes outputs and the final state; else the states before each chunk."""
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
        x = load_tile(moved(v, start, head), 0, t, c, is_values)
        if IS_OUTPUT:
            query = load_tile(moved(intra.q, start, head // repeat), 0, t, i, is_keys)
            o = tl.dot(query, s.to(x.dtype), input_precision="tf32x3")
            if not IS_CHANNEL:
                o *= tl.load(intra.decays.from_start + own + t * heads, mask=is_in, other=0.0)[:, None]
            o = tl.dot(
                load_scores(intra.scores, start, head, heads, count, CHUNK), x, o, input_precision="tf32x3"
            )
            store_tile(dense(out, start, head, heads, V), 0, t, c, o, is_values)
        else:
            store_state(states, chunk, i, c, s, K, V)
        key = load_tile(moved(intra.k, start, head // repeat), 0, t, i, is_keys)
        if not IS_CHANNEL:
            until = tl.load(intra.decays.to_end + own + t * heads, mask=is_in, other=0.0)
            x = (x.to(tl.float32) * until[:, None]).to(x.dtype)
        s = kept_of(s, intra.decays, own, chunk, count, heads, i, K, CHUNK, IS_CHANNEL)
        s = tl.dot(tl.trans(key), x, s, input_precision="tf32x3")
    if IS_OUTPUT:
        store_state(ht, own_state, i, c, s, K, V)


@triton.jit
def inter_chunk_backward(
    intra,
    inter,
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
    """Gradients of v, of the state behind each chunk, and of the first state."""
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
        key = load_tile(moved(intra.k, start, head // repeat), 0, t, i, is_keys)
        dv = tl.dot(key, d.to(g.dtype), input_precision="tf32x3")
        if not IS_CHANNEL:
            dv *= tl.load(intra.decays.to_end + own + t * heads, mask=is_in, other=0.0)[:, None]
        score = load_scores(intra.scores, start, head, heads, count, CHUNK)
        dv = tl.dot(tl.trans(score), g, dv, input_precision="tf32x3")
        store_tile(dense(inter.grad_x, start, head, heads, V), 0, t, c, dv, is_values)
        d = kept_of(d, intra.decays, own, chunk, count, heads, i, K, CHUNK, IS_CHANNEL)
        if not IS_CHANNEL:
            into = tl.load(intra.decays.from_start + own + t * heads, mask=is_in, other=0.0)
            g = (g.to(tl.float32) * into[:, None]).to(g.dtype)
        query = load_tile(moved(intra.q, start, head // repeat), 0, t, i, is_keys)
        d = tl.dot(tl.trans(query), g, d, input_precision="tf32x3")
    if HAS_STATE:
        store_state(dh0, own_state, i, c, d, K, V)


@triton.jit
def linear_attention_backward_scan(
    intra,
    inter,
    v,
    h0,
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
            *(intra, inter, dht, dh0, sizes),
            *(K, V, KEYS, VALUES, CHUNK, HAS_END, HAS_STATE, IS_CHANNEL, STAGES),
        )
    else:
        linear_attention_forward(
            *(intra, v, h0, None, None, inter.states, sizes),
            *(K, V, KEYS, VALUES, CHUNK, HAS_FIRST, IS_CHANNEL, False, STAGES),
        )
