"""What is local to a chunk when each key channel decays by its own factor, in Triton.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
The decay between tokens is now inside the products over K. Blocks of 2, 4, ... C tokens take the products of
their right half with their left half, each decayed up to the middle of the block: both exponents are sums of
log decays of a few tokens and never above zero, so that no decay is too strong, and nothing is a difference
of large sums. What is left is the product of each token with itself.
"""

import triton
import triton.language as tl

from kernels.linear_attention.triton_chunks import (
    add_sums_of,
    channel_decays,
    chunk_at,
    chunk_documents,
    dense,
    is_between,
    is_pair,
    is_right,
    load_gates,
    load_tile,
    middle_decay,
    moved,
    products_of,
    store_tile,
)
from kernels.linear_attention.triton_state import load_scores, load_state


@triton.jit
def linear_attention_intra_chunk_channel(
    q,
    k,
    log_decay,
    document,
    intra,
    sizes,
    K: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_SCORED: tl.constexpr,
):
    """Scores (if IS_SCORED), q decayed from the chunk's start, k to its end, and the decay over the chunk."""
    row, n, head, start, count = chunk_at(tl.program_id(0), sizes, CHUNK)
    heads = sizes.heads
    t, i = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK)
    query_at, key_at = moved(q, start, head // sizes.repeat), moved(k, start, head // sizes.repeat)
    gate_at = moved(log_decay, start, head)
    number, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    if IS_SCORED:
        score, alone = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
        for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
            is_key = (t < count)[:, None] & (at + i < K)[None, :]
            key, query = load_tile(key_at, at, t, i, is_key), load_tile(query_at, at, t, i, is_key)
            gates = load_gates(gate_at, at, t, i, is_key)
            alone += tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)
            half = 1
            while half < CHUNK:
                decay, is_later = middle_decay(gates, half, CHUNK), is_right(t, half)[:, None]
                earlier = tl.where(is_later, 0.0, key.to(tl.float32) * decay).to(key.dtype)
                asking = tl.where(is_later, query.to(tl.float32) * decay, 0.0).to(query.dtype)
                found = tl.dot(asking, tl.trans(earlier), input_precision="tf32x3")
                score += tl.where(is_pair(t[:, None], t[None, :], half), found, 0.0)
                half *= 2
        score = tl.where(number[:, None] == number[None, :], score, 0.0)
        score += tl.where(t[:, None] == t[None, :], alone[:, None], 0.0)
        store_tile(dense(intra.scores, start, head, heads, CHUNK), 0, t, t, score, (t < count)[:, None])
    for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
        is_key = (t < count)[:, None] & (at + i < K)[None, :]
        key = load_tile(key_at, at, t, i, is_key).to(tl.float32)
        query = load_tile(query_at, at, t, i, is_key).to(tl.float32)
        into, until = channel_decays(load_gates(gate_at, at, t, i, is_key), is_carried, is_lasting, CHUNK)
        store_tile(moved(intra.q, start, head), at, t, i, query * into, is_key)
        store_tile(moved(intra.k, start, head), at, t, i, key * until, is_key)
        whole = tl.sum(tl.where(t[:, None] == CHUNK - 1, into, 0.0), axis=0)
        chunk = (row * sizes.chunks + n) * heads + head
        tl.store(intra.decays.kept + chunk * K + at + i, whole, mask=at + i < K)


@triton.jit
def linear_attention_backward_pairs(
    v,
    document,
    inter,
    grad_scores,
    sizes,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
):
    """Gradients of scores; one program takes a chunk of a value head."""
    _, n, head, start, count = chunk_at(tl.program_id(0), sizes, CHUNK)
    heads = sizes.heads
    t = tl.arange(0, CHUNK)
    number, _, _ = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    grad_at, value_at = dense(inter.grad_out, start, head, heads, V), moved(v, start, head)
    d_scores = products_of(grad_at, value_at, count, V, VALUES, VALUE_BLOCK, CHUNK)
    is_seen = (t[None, :] <= t[:, None]) & (number[:, None] == number[None, :])
    d_scores = tl.where(is_seen, d_scores, 0.0)
    store_tile(dense(grad_scores, start, head, heads, CHUNK), 0, t, t, d_scores, (t < count)[:, None])


@triton.jit
def linear_attention_backward_channel(
    q,
    k,
    v,
    log_decay,
    document,
    inter,
    grad_scores,
    grads,
    sizes,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_LEARNED: tl.constexpr,
):
    """Gradients of q, k and log_decay: the part of each block of K apart.

    One program takes a block of K in a chunk of a value head; gradients of q and k are this head's.
    """
    BLOCKS: tl.constexpr = KEYS // KEY_BLOCK
    # The blocks of K run side by side, so that what they all read comes from memory once.
    at = tl.program_id(0) % BLOCKS * KEY_BLOCK
    row, n, head, start, count = chunk_at(tl.program_id(0) // BLOCKS, sizes, CHUNK)
    heads = sizes.heads
    t, i, c = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_in, chunk = t < count, (row * sizes.chunks + n) * heads + head
    is_keys = is_in[:, None] & (at + i < K)[None, :]
    _, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    grad_at, value_at = dense(inter.grad_out, start, head, heads, V), moved(v, start, head)
    # Through the states.
    dq, dk = tl.zeros([CHUNK, KEY_BLOCK], tl.float32), tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
    ends = tl.zeros([KEY_BLOCK], tl.float32)
    for values in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
        is_values = is_in[:, None] & (values + c < V)[None, :]
        s = load_state(inter.states, chunk, at + i, values + c, K, V, True)
        g = load_tile(grad_at, values, t, c, is_values)
        dq = tl.dot(g, tl.trans(s.to(g.dtype)), dq, input_precision="tf32x3")
        ds = load_state(inter.grad_states, chunk, at + i, values + c, K, V, True)
        x = load_tile(value_at, values, t, c, is_values)
        dk = tl.dot(x, tl.trans(ds.to(g.dtype)), dk, input_precision="tf32x3")
        if IS_LEARNED:
            ends += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1)
    query = load_tile(moved(q, start, head // sizes.repeat), at, t, i, is_keys)
    key = load_tile(moved(k, start, head // sizes.repeat), at, t, i, is_keys)
    gates = load_gates(moved(log_decay, start, head), at, t, i, is_keys)
    into, until = channel_decays(gates, is_carried, is_lasting, CHUNK)
    dq *= into
    dk *= until
    d_gate = tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
    if IS_LEARNED:
        # A gate decays what later tokens read of the state, and what earlier tokens leave in it.
        d_gate += ends[None, :] * tl.sum(tl.where(t[:, None] == CHUNK - 1, into, 0.0), axis=0)[None, :]
        d_gate = add_sums_of(t[None, :] >= t[:, None], dq * query.to(tl.float32), d_gate, query.dtype)
        d_gate = add_sums_of(t[None, :] < t[:, None], dk * key.to(tl.float32), d_gate, query.dtype)
    ptr = grad_scores + (start * heads + head) * CHUNK + t * (heads * CHUNK + 1)
    alone = tl.load(ptr, mask=is_in, other=0.0).to(tl.float32)[:, None]
    dk += alone * query.to(tl.float32)
    dq += alone * key.to(tl.float32)
    half = 1
    while half < CHUNK:
        decay, is_later = middle_decay(gates, half, CHUNK), is_right(t, half)[:, None]
        earlier = tl.where(is_later, 0.0, key.to(tl.float32) * decay).to(key.dtype)
        asking = tl.where(is_later, query.to(tl.float32) * decay, 0.0).to(query.dtype)
        pairs = load_scores(grad_scores, start, head, heads, count, CHUNK)
        pairs = tl.where(is_pair(t[:, None], t[None, :], half), pairs, 0.0)
        through = tl.dot(pairs, earlier, input_precision="tf32x3") * decay
        dq += through
        back = tl.dot(tl.trans(pairs), asking, input_precision="tf32x3") * decay
        dk += back
        if IS_LEARNED:
            by_gate = through * query.to(tl.float32) + back * key.to(tl.float32)
            d_gate = add_sums_of(is_between(t[None, :], t[:, None], half), by_gate, d_gate, query.dtype)
        half *= 2
    store_tile(dense(grads.q, start, head, heads, K), at, t, i, dq, is_keys)
    store_tile(dense(grads.k, start, head, heads, K), at, t, i, dk, is_keys)
    if IS_LEARNED:
        store_tile(dense(grads.log_decay, start, head, heads, K), at, t, i, d_gate, is_keys)
