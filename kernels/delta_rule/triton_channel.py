"""What is local to a chunk of the delta rule when each key channel decays by its own factor, in Triton.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
The products over K, with the decays inside, go by halves of blocks, as in linear attention.
"""

import triton
import triton.language as tl

from kernels.delta_rule.triton_solve import load_rates, through_values, unit_lower_inverse
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
    store_tile,
)
from kernels.linear_attention.triton_state import load_scores, load_state


@triton.jit
def delta_rule_intra_chunk_channel(
    q,
    k,
    log_decay,
    beta,
    document,
    intra,
    sizes,
    K: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_SOLVED: tl.constexpr,
    IS_KEPT: tl.constexpr,
):
    """All that `delta_rule_intra_chunk_head` finds, and q and k decayed from the chunk's start."""
    row, n, head, start, count = chunk_at(tl.program_id(0), sizes, CHUNK)
    heads = sizes.heads
    t, i = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK)
    is_in = t < count
    query_at, key_at = moved(q, start, head // sizes.repeat), moved(k, start, head // sizes.repeat)
    gate_at = moved(log_decay, start, head)
    number, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    if IS_SOLVED:
        solved = load_scores(intra.inverse, start, head, heads, count, CHUNK).to(tl.float32)
    else:
        score, system = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
        alone = tl.zeros([CHUNK], tl.float32)
        for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
            is_key = is_in[:, None] & (at + i < K)[None, :]
            key, query = load_tile(key_at, at, t, i, is_key), load_tile(query_at, at, t, i, is_key)
            gates = load_gates(gate_at, at, t, i, is_key)
            alone += tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)
            half = 1
            while half < CHUNK:
                decay, is_later = middle_decay(gates, half, CHUNK), is_right(t, half)[:, None]
                decayed = key.to(tl.float32) * decay
                later = tl.where(is_later, decayed, 0.0).to(key.dtype)
                earlier = tl.trans(tl.where(is_later, 0.0, decayed).to(key.dtype))
                asking = tl.where(is_later, query.to(tl.float32) * decay, 0.0).to(query.dtype)
                is_block = is_pair(t[:, None], t[None, :], half)
                score += tl.where(is_block, tl.dot(asking, earlier, input_precision="tf32x3"), 0.0)
                system += tl.where(is_block, tl.dot(later, earlier, input_precision="tf32x3"), 0.0)
                half *= 2
        is_same = number[:, None] == number[None, :]
        score = tl.where(is_same, score, 0.0) + tl.where(t[:, None] == t[None, :], alone[:, None], 0.0)
        system *= load_rates(beta, start, head, t, is_in)[:, None]
        solved = unit_lower_inverse(tl.where((t[None, :] < t[:, None]) & is_same, system, 0.0), CHUNK)
        if IS_KEPT:
            square = dense(intra.inverse, start, head, heads, CHUNK)
            store_tile(square, 0, t, t, solved, is_in[:, None])
        score = tl.dot(score, solved, input_precision="tf32x3")
        store_tile(dense(intra.scores, start, head, heads, CHUNK), 0, t, t, score, is_in[:, None])
    for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
        is_key = is_in[:, None] & (at + i < K)[None, :]
        key = load_tile(key_at, at, t, i, is_key).to(tl.float32)
        query = load_tile(query_at, at, t, i, is_key).to(tl.float32)
        into, until = channel_decays(load_gates(gate_at, at, t, i, is_key), is_carried, is_lasting, CHUNK)
        store_tile(moved(intra.q, start, head), at, t, i, query * into, is_key)
        store_tile(moved(intra.k, start, head), at, t, i, key * into, is_key)
        k_ut = tl.dot(tl.trans(solved), key * until, input_precision="tf32x3")
        store_tile(dense(intra.k_ut, start, head, heads, K), at, t, i, k_ut, is_key)
        whole = tl.sum(tl.where(t[:, None] == CHUNK - 1, into, 0.0), axis=0)
        chunk = (row * sizes.chunks + n) * heads + head
        tl.store(intra.decays.kept + chunk * K + at + i, whole, mask=at + i < K)


@triton.jit
def delta_rule_backward_pairs(
    v_error,
    beta,
    document,
    intra,
    inter,
    written,
    grad_scores,
    grad_system,
    grads,
    sizes,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
):
    """What is written, and gradients of scores, A over beta, v, beta.

    One program takes a chunk of a value head; the gradient of beta is the part through the values.
    """
    _, n, head, start, count = chunk_at(tl.program_id(0), sizes, CHUNK)
    heads = sizes.heads
    t = tl.arange(0, CHUNK)
    is_in = t < count
    number, _, _ = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    d_scores, d_system, d_rate = through_values(
        *(v_error, load_rates(beta, start, head, t, is_in), intra, inter, grads.v, written),
        *(start, count, head, heads, V, VALUES, VALUE_BLOCK, CHUNK, True),
    )
    is_same = number[:, None] == number[None, :]
    d_scores = tl.where((t[None, :] <= t[:, None]) & is_same, d_scores, 0.0)
    store_tile(dense(grad_scores, start, head, heads, CHUNK), 0, t, t, d_scores, is_in[:, None])
    d_system = tl.where((t[None, :] < t[:, None]) & is_same, -d_system, 0.0)
    store_tile(dense(grad_system, start, head, heads, CHUNK), 0, t, t, d_system, is_in[:, None])
    tl.store(grads.beta + start * heads + head + t * heads, d_rate, mask=is_in)


@triton.jit
def delta_rule_backward_channel(
    q,
    k,
    written,
    log_decay,
    beta,
    document,
    inter,
    grad_scores,
    grad_system,
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
    """Gradients of q, k and log_decay, and the rest of that of beta: the part of each block of K apart.

    One program takes a block of K in a chunk of a value head; gradients of q and k are this head's.
    """
    BLOCKS: tl.constexpr = KEYS // KEY_BLOCK
    # The blocks of K run side by side, so that what they all read comes from memory once.
    block = tl.program_id(0) % BLOCKS
    at = block * KEY_BLOCK
    row, n, head, start, count = chunk_at(tl.program_id(0) // BLOCKS, sizes, CHUNK)
    heads = sizes.heads
    t, i, c = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_in, own, chunk = t < count, start * heads + head, (row * sizes.chunks + n) * heads + head
    is_keys = is_in[:, None] & (at + i < K)[None, :]
    _, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    # Through the states.
    dq, dk = tl.zeros([CHUNK, KEY_BLOCK], tl.float32), tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
    erased, ends = tl.zeros([CHUNK, KEY_BLOCK], tl.float32), tl.zeros([KEY_BLOCK], tl.float32)
    for values in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
        is_values = is_in[:, None] & (values + c < V)[None, :]
        s = load_state(inter.states, chunk, at + i, values + c, K, V, True)
        g = load_tile(dense(inter.grad_out, start, head, heads, V), values, t, c, is_values)
        turned = tl.trans(s.to(g.dtype))
        dq = tl.dot(g, turned, dq, input_precision="tf32x3")
        dx = load_tile(dense(inter.grad_x, start, head, heads, V), values, t, c, is_values)
        erased = tl.dot(dx, turned, erased, input_precision="tf32x3")
        ds = load_state(inter.grad_states, chunk, at + i, values + c, K, V, True)
        x = load_tile(dense(written, start, head, heads, V), values, t, c, is_values)
        dk = tl.dot(x, tl.trans(ds.to(g.dtype)), dk, input_precision="tf32x3")
        if IS_LEARNED:
            ends += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1)
    query = load_tile(moved(q, start, head // sizes.repeat), at, t, i, is_keys)
    key = load_tile(moved(k, start, head // sizes.repeat), at, t, i, is_keys)
    gates = load_gates(moved(log_decay, start, head), at, t, i, is_keys)
    into, until = channel_decays(gates, is_carried, is_lasting, CHUNK)
    d_rate, rate = tl.zeros([CHUNK], tl.float32), load_rates(beta, start, head, t, is_in)
    dq *= into
    erased *= into * -rate[:, None]
    dk *= until
    d_gate = tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
    if IS_LEARNED:
        # A gate decays what later tokens read of the state, and what earlier tokens leave in it.
        d_gate += ends[None, :] * tl.sum(tl.where(t[:, None] == CHUNK - 1, into, 0.0), axis=0)[None, :]
        through = dq * query.to(tl.float32) + erased * key.to(tl.float32)
        d_gate = add_sums_of(t[None, :] >= t[:, None], through, d_gate, query.dtype)
        d_gate = add_sums_of(t[None, :] < t[:, None], dk * key.to(tl.float32), d_gate, query.dtype)
    dk += erased
    alone = tl.load(grad_scores + own * CHUNK + t * (heads * CHUNK + 1), mask=is_in, other=0.0)
    dk += alone.to(tl.float32)[:, None] * query.to(tl.float32)
    dq += alone.to(tl.float32)[:, None] * key.to(tl.float32)
    half = 1
    while half < CHUNK:
        decay, is_later = middle_decay(gates, half, CHUNK), is_right(t, half)[:, None]
        is_block = is_pair(t[:, None], t[None, :], half)
        earlier = tl.where(is_later, 0.0, key.to(tl.float32) * decay).to(key.dtype)
        asking = tl.where(is_later, query.to(tl.float32) * decay, 0.0).to(query.dtype)
        pairs = tl.where(is_block, load_scores(grad_scores, start, head, heads, count, CHUNK), 0.0)
        through = tl.dot(pairs, earlier, input_precision="tf32x3") * decay
        dq += through
        by_gate = through * query.to(tl.float32)
        back = tl.dot(tl.trans(pairs), asking, input_precision="tf32x3")
        pairs = tl.where(is_block, load_scores(grad_system, start, head, heads, count, CHUNK), 0.0)
        through = tl.dot(pairs, earlier, input_precision="tf32x3") * decay
        d_rate += tl.sum(through * key.to(tl.float32), axis=1)
        through *= rate[:, None]
        dk += through
        by_gate += through * key.to(tl.float32)
        later = tl.where(is_later, key.to(tl.float32) * decay * rate[:, None], 0.0).to(key.dtype)
        back = tl.dot(tl.trans(pairs), later, back, input_precision="tf32x3") * decay
        dk += back
        if IS_LEARNED:
            by_gate += back * key.to(tl.float32)
            d_gate = add_sums_of(is_between(t[None, :], t[:, None], half), by_gate, d_gate, query.dtype)
        half *= 2
    store_tile(dense(grads.q, start, head, heads, K), at, t, i, dq, is_keys)
    store_tile(dense(grads.k, start, head, heads, K), at, t, i, dk, is_keys)
    if IS_LEARNED:
        store_tile(dense(grads.log_decay, start, head, heads, K), at, t, i, d_gate, is_keys)
    part = (
        (block + 1).to(tl.int64)
        * (tl.num_programs(0) // (BLOCKS * heads * sizes.chunks))
        * sizes.tokens
        * heads
    )
    tl.store(grads.beta + part + own + t * heads, d_rate, mask=is_in)
