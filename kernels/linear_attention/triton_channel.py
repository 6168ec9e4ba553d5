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
    chunk_documents,
    is_between,
    is_pair,
    is_right,
    sums_of,
    three_parts,
    unit_lower_inverse,
)


@triton.jit
def linear_attention_intra_chunk_channel(
    q,
    k,
    log_decay,
    beta,
    document,
    scores,
    inverse,
    q_decayed,
    k_decayed,
    k_ut,
    kept,
    tokens,
    chunks,
    heads,
    repeat,
    q_token,
    q_head,
    k_token,
    k_head,
    decay_token,
    decay_head,
    beta_token,
    beta_head,
    K: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_DELTA: tl.constexpr,
    IS_SOLVED: tl.constexpr,
    IS_KEPT: tl.constexpr,
):
    """All that `linear_attention_intra_chunk_head` finds, and q and k decayed from the chunk's start."""
    head, n = tl.program_id(0) % heads, (tl.program_id(0) // heads) % chunks
    row = (tl.program_id(0) // heads // chunks).to(tl.int64)
    start, count = row * tokens + n * CHUNK, tl.minimum(tokens - n * CHUNK, CHUNK)
    t, j, i = tl.arange(0, CHUNK), tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK)
    is_in, is_before = t < count, j[None, :] < t[:, None]
    own = start * heads + head
    square = own * CHUNK + t[:, None] * (heads * CHUNK) + j[None, :]
    q_base = q + start * q_token + (head // repeat) * q_head
    k_base = k + start * k_token + (head // repeat) * k_head
    g_base = log_decay + start * decay_token + head * decay_head
    out_base, out_row_offs = own * K, t[:, None] * (heads * K) + i[None, :]
    q_place, k_place = t[:, None] * q_token + i[None, :], t[:, None] * k_token + i[None, :]
    g_place = t[:, None] * decay_token + i[None, :]
    number, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    if IS_SOLVED:
        solved = tl.load(inverse + square, mask=is_in[:, None], other=0.0).to(tl.float32)
    else:
        score, system = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
        alone = tl.zeros([CHUNK], tl.float32)
        for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
            is_key = is_in[:, None] & (at + i < K)[None, :]
            key = tl.load(k_base + at + k_place, mask=is_key, other=0.0)
            query = tl.load(q_base + at + q_place, mask=is_key, other=0.0)
            gate = tl.load(g_base + at + g_place, mask=is_key, other=0.0).to(tl.float32)
            first, second, third = three_parts(tl.maximum(gate, -1000.0))
            alone += tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)
            half = 1
            while half < CHUNK:
                decay = tl.exp(sums_of(is_between(t[:, None], j[None, :], half), first, second, third))
                is_later = is_right(t, half)[:, None]
                decayed = key.to(tl.float32) * decay
                later = tl.where(is_later, decayed, 0.0).to(key.dtype)
                earlier = tl.trans(tl.where(is_later, 0.0, decayed).to(key.dtype))
                asking = tl.where(is_later, query.to(tl.float32) * decay, 0.0).to(query.dtype)
                is_block = is_pair(t[:, None], j[None, :], half)
                score += tl.where(is_block, tl.dot(asking, earlier, input_precision="tf32x3"), 0.0)
                if IS_DELTA:
                    system += tl.where(is_block, tl.dot(later, earlier, input_precision="tf32x3"), 0.0)
                half *= 2
        is_same = number[:, None] == number[None, :]
        score = tl.where(is_same, score, 0.0) + tl.where(t[:, None] == j[None, :], alone[:, None], 0.0)
        if IS_DELTA:
            rate = tl.load(
                beta + start * beta_token + head * beta_head + t * beta_token, mask=is_in, other=0.0
            )
            system = tl.where(is_before & is_same, system * rate.to(tl.float32)[:, None], 0.0)
            solved = unit_lower_inverse(system, CHUNK)
            if IS_KEPT:
                tl.store(inverse + square, solved.to(inverse.dtype.element_ty), mask=is_in[:, None])
            score = tl.dot(score, solved, input_precision="tf32x3")
        tl.store(scores + square, score.to(scores.dtype.element_ty), mask=is_in[:, None])
    for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
        is_key = is_in[:, None] & (at + i < K)[None, :]
        key = tl.load(k_base + at + k_place, mask=is_key, other=0.0).to(tl.float32)
        query = tl.load(q_base + at + q_place, mask=is_key, other=0.0).to(tl.float32)
        gate = tl.maximum(tl.load(g_base + at + g_place, mask=is_key, other=0.0).to(tl.float32), -1000.0)
        first, second, third = three_parts(gate)
        out_offs = out_base + at + out_row_offs
        into = tl.exp(sums_of(j[None, :] <= t[:, None], first, second, third))
        into = tl.where(is_carried[:, None], into, 0.0)
        tl.store(q_decayed + out_offs, (query * into).to(q_decayed.dtype.element_ty), mask=is_key)
        until = tl.exp(sums_of(j[None, :] > t[:, None], first, second, third))
        until = tl.where(is_lasting[:, None], until, 0.0)
        written = key * until
        if IS_DELTA:
            tl.store(k_decayed + out_offs, (key * into).to(k_decayed.dtype.element_ty), mask=is_key)
            written = tl.dot(tl.trans(solved), written, input_precision="tf32x3")
        tl.store(k_ut + out_offs, written.to(k_ut.dtype.element_ty), mask=is_key)
        whole = tl.sum(tl.where(t[:, None] == CHUNK - 1, into, 0.0), axis=0)
        chunk = (row * chunks + n) * heads + head
        tl.store(kept + chunk * K + at + i, whole, mask=at + i < K)


@triton.jit
def linear_attention_backward_pairs(
    x,
    beta,
    document,
    inverse,
    grad_out,
    grad_x,
    written,
    grad_scores,
    grad_system,
    grad_v,
    grad_beta,
    tokens,
    chunks,
    heads,
    x_token,
    x_head,
    beta_token,
    beta_head,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_DELTA: tl.constexpr,
):
    """Gradients of scores, and with the delta rule what is written, and gradients of A over beta, v, beta.

    x is v - k' S with the delta rule, else v. One program takes a chunk of a value head; that of beta is the
    part through the values.
    """
    head, n = tl.program_id(0) % heads, (tl.program_id(0) // heads) % chunks
    row = (tl.program_id(0) // heads // chunks).to(tl.int64)
    start, count = row * tokens + n * CHUNK, tl.minimum(tokens - n * CHUNK, CHUNK)
    t, j, c = tl.arange(0, CHUNK), tl.arange(0, CHUNK), tl.arange(0, VALUE_BLOCK)
    is_in, own = t < count, start * heads + head
    number, _, _ = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    x_place, values = t[:, None] * x_token + c[None, :], t[:, None] * (heads * V) + c[None, :]
    square = own * CHUNK + t[:, None] * (heads * CHUNK) + j[None, :]
    d_scores, d_system = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    d_rate, rate = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    if IS_DELTA:
        rate += tl.load(beta + start * beta_token + head * beta_head + t * beta_token, mask=is_in, other=0.0)
    for at in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
        is_values = is_in[:, None] & (at + c < V)[None, :]
        left = tl.load(x + start * x_token + head * x_head + at + x_place, mask=is_values, other=0.0)
        g = tl.load(grad_out + own * V + at + values, mask=is_values, other=0.0)
        if IS_DELTA:
            dx = tl.load(grad_x + own * V + at + values, mask=is_values, other=0.0)
            wide = left.to(tl.float32)
            d_rate += tl.sum(dx.to(tl.float32) * wide, axis=1)
            dv = dx.to(tl.float32) * rate[:, None]
            tl.store(grad_v + own * V + at + values, dv.to(grad_v.dtype.element_ty), mask=is_values)
            solved = tl.load(inverse + square, mask=is_in[:, None], other=0.0)
            left = (wide * rate[:, None]).to(left.dtype)
            left = tl.dot(solved, left, input_precision="tf32x3").to(left.dtype)
            tl.store(written + own * V + at + values, left, mask=is_values)
            d_system = tl.dot(dx, tl.trans(left), d_system, input_precision="tf32x3")
        d_scores = tl.dot(g, tl.trans(left), d_scores, input_precision="tf32x3")
    is_same = number[:, None] == number[None, :]
    d_scores = tl.where((j[None, :] <= t[:, None]) & is_same, d_scores, 0.0)
    tl.store(grad_scores + square, d_scores.to(grad_scores.dtype.element_ty), mask=is_in[:, None])
    if IS_DELTA:
        d_system = tl.where((j[None, :] < t[:, None]) & is_same, -d_system, 0.0)
        tl.store(grad_system + square, d_system.to(grad_system.dtype.element_ty), mask=is_in[:, None])
        tl.store(grad_beta + own + t * heads, d_rate, mask=is_in)


@triton.jit
def linear_attention_backward_channel(
    q,
    k,
    written,
    log_decay,
    beta,
    document,
    states,
    grad_out,
    grad_x,
    grad_states,
    grad_scores,
    grad_system,
    grad_q,
    grad_k,
    grad_decay,
    grad_beta,
    tokens,
    chunks,
    heads,
    repeat,
    q_token,
    q_head,
    k_token,
    k_head,
    written_token,
    written_head,
    decay_token,
    decay_head,
    beta_token,
    beta_head,
    K: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_DELTA: tl.constexpr,
    IS_LEARNED: tl.constexpr,
):
    """Gradients of q, k and log_decay, and the rest of that of beta: the part of each block of K apart.

    One program takes a block of K in a chunk of a value head; gradients of q and k are this head's.
    """
    BLOCKS: tl.constexpr = KEYS // KEY_BLOCK
    # The blocks of K run side by side, so that what they all read comes from memory once.
    block, own_chunk = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    head, n, at = own_chunk % heads, (own_chunk // heads) % chunks, block * KEY_BLOCK
    row = (own_chunk // heads // chunks).to(tl.int64)
    start, count = row * tokens + n * CHUNK, tl.minimum(tokens - n * CHUNK, CHUNK)
    t, j, i, c = tl.arange(0, CHUNK), tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_in, is_key = t < count, at + i < K
    is_keys = is_in[:, None] & is_key[None, :]
    own, chunk = start * heads + head, (row * chunks + n) * heads + head
    _, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    values = own * V + t[:, None] * (heads * V) + c[None, :]
    w_place = start * written_token + head * written_head + t[:, None] * written_token + c[None, :]
    square = own * CHUNK + t[:, None] * (heads * CHUNK) + j[None, :]
    s_place = chunk * (K * V) + (at + i)[:, None] * V + c[None, :]
    # Through the states.
    dq, dk = tl.zeros([CHUNK, KEY_BLOCK], tl.float32), tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
    erased, ends = tl.zeros([CHUNK, KEY_BLOCK], tl.float32), tl.zeros([KEY_BLOCK], tl.float32)
    for value_at in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
        is_value = value_at + c < V
        is_values, is_state = is_in[:, None] & is_value[None, :], is_key[:, None] & is_value[None, :]
        s = tl.load(states + value_at + s_place, mask=is_state, other=0.0)
        g = tl.load(grad_out + value_at + values, mask=is_values, other=0.0)
        turned = tl.trans(s.to(g.dtype))
        dq = tl.dot(g, turned, dq, input_precision="tf32x3")
        if IS_DELTA:
            dx = tl.load(grad_x + value_at + values, mask=is_values, other=0.0)
            erased = tl.dot(dx, turned, erased, input_precision="tf32x3")
        ds = tl.load(grad_states + value_at + s_place, mask=is_state, other=0.0)
        left = tl.load(written + value_at + w_place, mask=is_values, other=0.0)
        dk = tl.dot(left, tl.trans(ds.to(g.dtype)), dk, input_precision="tf32x3")
        if IS_LEARNED:
            ends += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1)
    q_place = start * q_token + (head // repeat) * q_head + at + t[:, None] * q_token + i[None, :]
    k_place = start * k_token + (head // repeat) * k_head + at + t[:, None] * k_token + i[None, :]
    g_place = start * decay_token + head * decay_head + at + t[:, None] * decay_token + i[None, :]
    query = tl.load(q + q_place, mask=is_keys, other=0.0)
    key = tl.load(k + k_place, mask=is_keys, other=0.0)
    gate = tl.maximum(tl.load(log_decay + g_place, mask=is_keys, other=0.0).to(tl.float32), -1000.0)
    first, second, third = three_parts(gate)
    d_rate, rate = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    into = tl.exp(sums_of(j[None, :] <= t[:, None], first, second, third))
    into = tl.where(is_carried[:, None], into, 0.0)
    dq *= into
    if IS_DELTA:
        rate += tl.load(beta + start * beta_token + head * beta_head + t * beta_token, mask=is_in, other=0.0)
        erased *= into * -rate[:, None]
    until = tl.exp(sums_of(j[None, :] > t[:, None], first, second, third))
    dk *= tl.where(is_lasting[:, None], until, 0.0)
    d_gate = tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
    if IS_LEARNED:
        # A gate decays what later tokens read of the state, and what earlier tokens leave in it.
        d_gate += ends[None, :] * tl.sum(tl.where(t[:, None] == CHUNK - 1, into, 0.0), axis=0)[None, :]
        through = dq * query.to(tl.float32) + erased * key.to(tl.float32)
        d_gate = add_sums_of(j[None, :] >= t[:, None], through, d_gate, q.dtype.element_ty)
        d_gate = add_sums_of(j[None, :] < t[:, None], dk * key.to(tl.float32), d_gate, q.dtype.element_ty)
    dk += erased
    alone = tl.load(grad_scores + own * CHUNK + t * (heads * CHUNK + 1), mask=is_in, other=0.0)
    dk += alone.to(tl.float32)[:, None] * query.to(tl.float32)
    dq += alone.to(tl.float32)[:, None] * key.to(tl.float32)
    half = 1
    while half < CHUNK:
        decay = tl.exp(sums_of(is_between(t[:, None], j[None, :], half), first, second, third))
        is_later, is_block = is_right(t, half)[:, None], is_pair(t[:, None], j[None, :], half)
        earlier = tl.where(is_later, 0.0, key.to(tl.float32) * decay).to(key.dtype)
        asking = tl.where(is_later, query.to(tl.float32) * decay, 0.0).to(query.dtype)
        pairs = tl.load(grad_scores + square, mask=is_in[:, None], other=0.0)
        pairs = tl.where(is_block, pairs, 0.0)
        through = tl.dot(pairs, earlier, input_precision="tf32x3") * decay
        dq += through
        moved = through * query.to(tl.float32)
        back = tl.dot(tl.trans(pairs), asking, input_precision="tf32x3")
        if IS_DELTA:
            pairs = tl.load(grad_system + square, mask=is_in[:, None], other=0.0)
            pairs = tl.where(is_block, pairs, 0.0)
            through = tl.dot(pairs, earlier, input_precision="tf32x3") * decay
            d_rate += tl.sum(through * key.to(tl.float32), axis=1)
            through *= rate[:, None]
            dk += through
            moved += through * key.to(tl.float32)
            later = tl.where(is_later, key.to(tl.float32) * decay * rate[:, None], 0.0).to(key.dtype)
            back = tl.dot(tl.trans(pairs), later, back, input_precision="tf32x3")
        back *= decay
        dk += back
        if IS_LEARNED:
            moved += back * key.to(tl.float32)
            d_gate = add_sums_of(is_between(j[None, :], t[:, None], half), moved, d_gate, q.dtype.element_ty)
        half *= 2
    out_offs = own * K + at + t[:, None] * (heads * K) + i[None, :]
    tl.store(grad_q + out_offs, dq.to(grad_q.dtype.element_ty), mask=is_keys)
    tl.store(grad_k + out_offs, dk.to(grad_k.dtype.element_ty), mask=is_keys)
    if IS_LEARNED:
        tl.store(grad_decay + out_offs, d_gate.to(grad_decay.dtype.element_ty), mask=is_keys)
    if IS_DELTA:
        part = (block + 1).to(tl.int64) * (tl.num_programs(0) // (BLOCKS * heads * chunks)) * tokens * heads
        tl.store(grad_beta + part + own + t * heads, d_rate, mask=is_in)
