"""What is local to a chunk of the delta rule when a head decays by one factor, in Triton.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
"""

import triton
import triton.language as tl

from kernels.delta_rule.triton_solve import load_rates, through_values, unit_lower_inverse, written_of
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
from kernels.linear_attention.triton_state import load_scores, load_state


@triton.jit
def delta_rule_intra_chunk_head(
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
    """Scores, decays to the chunk's ends, inverse (if IS_KEPT) and k_ut; with IS_SOLVED only k_ut."""
    _, n, head, start, count = chunk_at(tl.program_id(0), sizes, CHUNK)
    heads = sizes.heads
    t, i, own = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK), start * heads + head
    is_in = t < count
    key_at = moved(k, start, head // sizes.repeat)
    if IS_SOLVED:
        until = tl.load(intra.decays.to_end + own + t * heads, mask=is_in, other=0.0)
        solved = load_scores(intra.inverse, start, head, heads, count, CHUNK).to(tl.float32)
    else:
        number, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
        running = running_decay(log_decay, start, head, count, CHUNK, True)
        system = products_of(key_at, key_at, count, K, KEYS, KEY_BLOCK, CHUNK)
        rate = load_rates(beta, start, head, t, is_in)
        system *= decay_between(running, number, CHUNK) * rate[:, None]
        solved = unit_lower_inverse(tl.where(t[None, :] < t[:, None], system, 0.0), CHUNK)
        if IS_KEPT:
            square = dense(intra.inverse, start, head, heads, CHUNK)
            store_tile(square, 0, t, t, solved, is_in[:, None])
        # Only now: together with the solve it would not fit in registers.
        score = products_of(moved(q, start, head // sizes.repeat), key_at, count, K, KEYS, KEY_BLOCK, CHUNK)
        score = tl.dot(score * decay_between(running, number, CHUNK), solved, input_precision="tf32x3")
        into, until = head_decays(running, is_carried, is_lasting, CHUNK)
        tl.store(intra.decays.from_start + own + t * heads, into, mask=is_in)
        tl.store(intra.decays.to_end + own + t * heads, until, mask=is_in)
        store_tile(dense(intra.scores, start, head, heads, CHUNK), 0, t, t, score, is_in[:, None])
    for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
        is_key = is_in[:, None] & (at + i < K)[None, :]
        key = load_tile(key_at, at, t, i, is_key).to(tl.float32) * until[:, None]
        found = tl.dot(tl.trans(solved), key, input_precision="tf32x3")
        store_tile(dense(intra.k_ut, start, head, heads, K), at, t, i, found, is_key)


@triton.jit
def delta_rule_backward_head(
    q,
    k,
    v_error,
    log_decay,
    beta,
    document,
    intra,
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
    HAS_DOCUMENT: tl.constexpr,
    IS_LEARNED: tl.constexpr,
):
    """Gradients of all inputs from those of x and of the states.

    One program takes one value head of a chunk; gradients of q and k are this head's.
    """
    row, n, head, start, count = chunk_at(tl.program_id(0), sizes, CHUNK)
    heads = sizes.heads
    t, i, c = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_in, is_before, own = t < count, t[None, :] < t[:, None], start * heads + head
    chunk = (row * sizes.chunks + n) * heads + head
    number, _, _ = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    query_at, key_at = moved(q, start, head // sizes.repeat), moved(k, start, head // sizes.repeat)
    grad_at, dx_at = (
        dense(inter.grad_out, start, head, heads, V),
        dense(inter.grad_x, start, head, heads, V),
    )
    rate = load_rates(beta, start, head, t, is_in)
    d_scores, d_system, d_rate = through_values(
        *(v_error, rate, intra, inter, grads.v, None, start, count, head, heads),
        *(V, VALUES, VALUE_BLOCK, CHUNK, False),
    )
    decay = decay_between(running_decay(log_decay, start, head, count, CHUNK, True), number, CHUNK)
    d_scores *= decay
    d_system = tl.where(is_before, -d_system * decay, 0.0)
    alike = products_of(key_at, key_at, count, K, KEYS, KEY_BLOCK, CHUNK)
    d_rate += tl.sum(d_system * alike, axis=1)
    d_system *= rate[:, None]
    tl.store(grads.beta + own + t * heads, d_rate.to(grads.beta.dtype.element_ty), mask=is_in)
    across = tl.zeros([CHUNK], tl.float32)
    if IS_LEARNED:
        pairs = d_scores * products_of(query_at, key_at, count, K, KEYS, KEY_BLOCK, CHUNK)
        across += across_gates(pairs + d_system * alike, CHUNK)
    into = tl.load(intra.decays.from_start + own + t * heads, mask=is_in, other=0.0)
    until = tl.load(intra.decays.to_end + own + t * heads, mask=is_in, other=0.0)
    from_there, to_there = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    ends = tl.zeros([1], tl.float32)
    narrow = d_scores.to(q.pointer.dtype.element_ty)
    both = (d_system + tl.trans(d_system)).to(q.pointer.dtype.element_ty)
    for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
        is_keys = is_in[:, None] & (at + i < K)[None, :]
        dq, dk = tl.zeros([CHUNK, KEY_BLOCK], tl.float32), tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
        erased = tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
        for values in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
            is_values = is_in[:, None] & (values + c < V)[None, :]
            error = load_tile(dense(v_error, start, head, heads, V), values, t, c, is_values)
            g = load_tile(grad_at, values, t, c, is_values)
            s = load_state(inter.states, chunk, at + i, values + c, K, V, True)
            turned = tl.trans(s.to(g.dtype))
            dq = tl.dot(g, turned, dq, input_precision="tf32x3")
            erased = tl.dot(
                load_tile(dx_at, values, t, c, is_values), turned, erased, input_precision="tf32x3"
            )
            x = written_of(error, rate, load_scores(intra.inverse, start, head, heads, count, CHUNK))
            ds = load_state(inter.grad_states, chunk, at + i, values + c, K, V, True)
            dk = tl.dot(x, tl.trans(ds.to(g.dtype)), dk, input_precision="tf32x3")
            if IS_LEARNED:
                ends += tl.sum(tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1), axis=0)
        query = load_tile(query_at, at, t, i, is_keys)
        key = load_tile(key_at, at, t, i, is_keys)
        dq *= into[:, None]
        dk *= until[:, None]
        erased *= (-rate * into)[:, None]
        if IS_LEARNED:
            from_there += tl.sum(dq * query.to(tl.float32), axis=1)
            to_there += tl.sum(dk * key.to(tl.float32), axis=1)
            from_there += tl.sum(erased * key.to(tl.float32), axis=1)
        dk += erased
        dk = tl.dot(both, key, dk, input_precision="tf32x3")
        dq = tl.dot(narrow, key, dq, input_precision="tf32x3")
        dk = tl.dot(tl.trans(narrow), query, dk, input_precision="tf32x3")
        store_tile(dense(grads.q, start, head, heads, K), at, t, i, dq, is_keys)
        store_tile(dense(grads.k, start, head, heads, K), at, t, i, dk, is_keys)
    if IS_LEARNED:
        grad = gate_gradient(across, from_there, to_there, ends, into, count, CHUNK)
        tl.store(grads.log_decay + own + t * heads, grad.to(grads.log_decay.dtype.element_ty), mask=is_in)
