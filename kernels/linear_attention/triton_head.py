"""What is local to a chunk when a head decays by one factor, in Triton.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
D is the decay between tokens of a chunk: scores = D q k^T.
"""

import triton
import triton.language as tl

from kernels.linear_attention.triton_chunks import (
    across_gates,
    chunk_at,
    chunk_documents,
    decay_between,
    dense,
    gate_gradient,
    head_decays,
    load_tile,
    moved,
    products_of,
    running_decay,
    store_tile,
)
from kernels.linear_attention.triton_state import load_state


@triton.jit
def linear_attention_intra_chunk_head(
    q,
    k,
    log_decay,
    document,
    scores,
    decays,
    sizes,
    K: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
):
    """Scores, and decays to the chunk's ends."""
    _, n, head, start, count = chunk_at(tl.program_id(0), sizes, CHUNK)
    heads = sizes.heads
    t = tl.arange(0, CHUNK)
    number, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    running = running_decay(log_decay, start, head, count, CHUNK, HAS_DECAY)
    query, key = moved(q, start, head // sizes.repeat), moved(k, start, head // sizes.repeat)
    score = products_of(query, key, count, K, KEYS, KEY_BLOCK, CHUNK) * decay_between(running, number, CHUNK)
    into, until = head_decays(running, is_carried, is_lasting, CHUNK)
    tl.store(decays.from_start + start * heads + head + t * heads, into, mask=t < count)
    tl.store(decays.to_end + start * heads + head + t * heads, until, mask=t < count)
    store_tile(dense(scores, start, head, heads, CHUNK), 0, t, t, score, (t < count)[:, None])


@triton.jit
def linear_attention_backward_head(
    q,
    k,
    v,
    log_decay,
    document,
    decays,
    inter,
    grads,
    sizes,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_LEARNED: tl.constexpr,
):
    """Gradients of q, k and log_decay; one program takes a chunk of a value head, q and k are this head's."""
    row, n, head, start, count = chunk_at(tl.program_id(0), sizes, CHUNK)
    heads = sizes.heads
    t, i, c = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_in, own, chunk = t < count, start * heads + head, (row * sizes.chunks + n) * heads + head
    number, _, _ = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    query_at, key_at, value_at = (
        moved(q, start, head // sizes.repeat),
        moved(k, start, head // sizes.repeat),
        moved(v, start, head),
    )
    grad_at = dense(inter.grad_out, start, head, heads, V)
    d_scores = products_of(grad_at, value_at, count, V, VALUES, VALUE_BLOCK, CHUNK)
    d_scores *= decay_between(running_decay(log_decay, start, head, count, CHUNK, HAS_DECAY), number, CHUNK)
    across = tl.zeros([CHUNK], tl.float32)
    if IS_LEARNED:
        across += across_gates(
            d_scores * products_of(query_at, key_at, count, K, KEYS, KEY_BLOCK, CHUNK), CHUNK
        )
    into = tl.load(decays.from_start + own + t * heads, mask=is_in, other=0.0)
    until = tl.load(decays.to_end + own + t * heads, mask=is_in, other=0.0)
    from_there, to_there = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    ends = tl.zeros([1], tl.float32)
    narrow = d_scores.to(q.pointer.dtype.element_ty)
    for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
        is_keys = is_in[:, None] & (at + i < K)[None, :]
        dq, dk = tl.zeros([CHUNK, KEY_BLOCK], tl.float32), tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
        for values in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
            is_values = is_in[:, None] & (values + c < V)[None, :]
            x = load_tile(value_at, values, t, c, is_values)
            g = load_tile(grad_at, values, t, c, is_values)
            s = load_state(inter.states, chunk, at + i, values + c, K, V, True)
            dq = tl.dot(g, tl.trans(s.to(g.dtype)), dq, input_precision="tf32x3")
            ds = load_state(inter.grad_states, chunk, at + i, values + c, K, V, True)
            dk = tl.dot(x, tl.trans(ds.to(g.dtype)), dk, input_precision="tf32x3")
            if IS_LEARNED:
                ends += tl.sum(tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1), axis=0)
        query = load_tile(query_at, at, t, i, is_keys)
        key = load_tile(key_at, at, t, i, is_keys)
        dq *= into[:, None]
        dk *= until[:, None]
        if IS_LEARNED:
            from_there += tl.sum(dq * query.to(tl.float32), axis=1)
            to_there += tl.sum(dk * key.to(tl.float32), axis=1)
        dq = tl.dot(narrow, key, dq, input_precision="tf32x3")
        dk = tl.dot(tl.trans(narrow), query, dk, input_precision="tf32x3")
        store_tile(dense(grads.q, start, head, heads, K), at, t, i, dq, is_keys)
        store_tile(dense(grads.k, start, head, heads, K), at, t, i, dk, is_keys)
    if IS_LEARNED:
        grad = gate_gradient(across, from_there, to_there, ends, into, count, CHUNK)
        tl.store(grads.log_decay + own + t * heads, grad.to(grads.log_decay.dtype.element_ty), mask=is_in)
