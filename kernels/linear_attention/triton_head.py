"""What is local to a chunk when a head decays by one factor, in Triton.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
D is the decay between tokens of a chunk, f that of the entering state until a token (decay_from_start), e
that of a write until the chunk's end (decay_to_end). With A = beta D k k^T below the diagonal, the delta rule
solves (I + A) u = x for what is written: the UT transform of DeltaNet, arXiv 2406.06484, with the decays of
arXiv 2412.06464. With L = (I + A)^-1 moved to the other side of each product

    scores = (D q k^T) L      k_ut = L^T (e k)

and without the delta rule L is I.
"""

import triton
import triton.language as tl

from kernels.linear_attention.triton_chunks import (
    chunk_documents,
    decay_between,
    running_decay,
    unit_lower_inverse,
)


@triton.jit
def linear_attention_intra_chunk_head(
    q,
    k,
    log_decay,
    beta,
    document,
    scores,
    inverse,
    k_ut,
    decay_from_start,
    decay_to_end,
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
    HAS_DECAY: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_DELTA: tl.constexpr,
    IS_SOLVED: tl.constexpr,
    IS_KEPT: tl.constexpr,
):
    """Scores, decays to the chunk's ends, inverse (if IS_KEPT) and k_ut; with IS_SOLVED only k_ut."""
    head, n = tl.program_id(0) % heads, (tl.program_id(0) // heads) % chunks
    row = (tl.program_id(0) // heads // chunks).to(tl.int64)
    start, count = row * tokens + n * CHUNK, tokens - n * CHUNK
    count = tl.minimum(count, CHUNK)
    t, j, i = tl.arange(0, CHUNK), tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK)
    is_in = t < count
    own = start * heads + head
    square = own * CHUNK + t[:, None] * (heads * CHUNK) + j[None, :]
    k_base = k + start * k_token + (head // repeat) * k_head
    k_place = t[:, None] * k_token + i[None, :]
    if not IS_SOLVED:
        number, is_carried, is_lasting = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
        gate_offs = start * decay_token + head * decay_head + t * decay_token
        running = running_decay(log_decay, gate_offs, count, CHUNK, HAS_DECAY)
        q_base = q + start * q_token + (head // repeat) * q_head
        q_place = t[:, None] * q_token + i[None, :]
        if IS_DELTA:
            system = tl.zeros([CHUNK, CHUNK], tl.float32)
            for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
                is_key = is_in[:, None] & (at + i < K)[None, :]
                key = tl.load(k_base + at + k_place, mask=is_key, other=0.0)
                system = tl.dot(key, tl.trans(key), system, input_precision="tf32x3")
            rate = tl.load(
                beta + start * beta_token + head * beta_head + t * beta_token, mask=is_in, other=0.0
            )
            system *= decay_between(running, number, CHUNK) * rate.to(tl.float32)[:, None]
            solved = unit_lower_inverse(tl.where(j[None, :] < t[:, None], system, 0.0), CHUNK)
            if IS_KEPT:
                tl.store(inverse + square, solved.to(inverse.dtype.element_ty), mask=is_in[:, None])
        # Only now: together with the solve it would not fit in registers.
        score = tl.zeros([CHUNK, CHUNK], tl.float32)
        for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
            is_key = is_in[:, None] & (at + i < K)[None, :]
            key = tl.load(k_base + at + k_place, mask=is_key, other=0.0)
            query = tl.load(q_base + at + q_place, mask=is_key, other=0.0)
            score = tl.dot(query, tl.trans(key), score, input_precision="tf32x3")
        score *= decay_between(running, number, CHUNK)
        if IS_DELTA:
            score = tl.dot(score, solved, input_precision="tf32x3")
        whole = tl.where(is_carried, tl.exp(running.to(tl.float32)), 0.0)
        tl.store(decay_from_start + own + t * heads, whole, mask=is_in)
        total = tl.sum(tl.where(t == CHUNK - 1, running, 0.0), axis=0)
        until = tl.where(is_lasting, tl.exp((total - running).to(tl.float32)), 0.0)
        tl.store(decay_to_end + own + t * heads, until, mask=is_in)
        tl.store(scores + square, score.to(scores.dtype.element_ty), mask=is_in[:, None])
    else:
        until = tl.load(decay_to_end + own + t * heads, mask=is_in, other=0.0)
        solved = tl.load(inverse + square, mask=is_in[:, None], other=0.0).to(tl.float32)
    if IS_DELTA:
        turned = tl.trans(solved)
        for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
            is_key = is_in[:, None] & (at + i < K)[None, :]
            key = tl.load(k_base + at + k_place, mask=is_key, other=0.0).to(tl.float32) * until[:, None]
            found = tl.dot(turned, key, input_precision="tf32x3")
            key_at = own * K + at + t[:, None] * (heads * K) + i[None, :]
            tl.store(k_ut + key_at, found.to(k_ut.dtype.element_ty), mask=is_key)


@triton.jit
def linear_attention_backward_head(
    q,
    k,
    x,
    log_decay,
    beta,
    document,
    inverse,
    decay_from_start,
    decay_to_end,
    states,
    grad_out,
    grad_x,
    grad_states,
    grad_q,
    grad_k,
    grad_v,
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
    x_token,
    x_head,
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
    HAS_DECAY: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    IS_DELTA: tl.constexpr,
    IS_LEARNED: tl.constexpr,
):
    """Gradients of all inputs from those of x and of the states; x is v - k' S with the delta rule, else v.

    One program takes one value head of a chunk; gradients of q and k are this head's.
    """
    head, n = tl.program_id(0) % heads, (tl.program_id(0) // heads) % chunks
    row = (tl.program_id(0) // heads // chunks).to(tl.int64)
    start, count = row * tokens + n * CHUNK, tl.minimum(tokens - n * CHUNK, CHUNK)
    t, j, i, c = tl.arange(0, CHUNK), tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_in, is_before = t < count, j[None, :] < t[:, None]
    own, chunk = start * heads + head, (row * chunks + n) * heads + head
    number, _, _ = chunk_documents(document, start, count, n == 0, CHUNK, HAS_DOCUMENT)
    q_base, k_base = (
        q + start * q_token + (head // repeat) * q_head,
        k + start * k_token + (head // repeat) * k_head,
    )
    q_place, k_place = t[:, None] * q_token + i[None, :], t[:, None] * k_token + i[None, :]
    x_base, g_base, dx_base = x + start * x_token + head * x_head, grad_out + own * V, grad_x + own * V
    x_place, values = t[:, None] * x_token + c[None, :], t[:, None] * (heads * V) + c[None, :]
    solved_at = inverse + own * CHUNK + t[:, None] * (heads * CHUNK) + j[None, :]
    d_scores, d_system = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    d_rate, rate = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    if IS_DELTA:
        rate += tl.load(beta + start * beta_token + head * beta_head + t * beta_token, mask=is_in, other=0.0)
    for value_at in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
        is_values = is_in[:, None] & (value_at + c < V)[None, :]
        left = tl.load(x_base + value_at + x_place, mask=is_values, other=0.0)
        g = tl.load(g_base + value_at + values, mask=is_values, other=0.0)
        if IS_DELTA:
            dx = tl.load(dx_base + value_at + values, mask=is_values, other=0.0)
            wide = left.to(tl.float32)
            d_rate += tl.sum(dx.to(tl.float32) * wide, axis=1)
            dv = dx.to(tl.float32) * rate[:, None]
            tl.store(grad_v + own * V + value_at + values, dv.to(grad_v.dtype.element_ty), mask=is_values)
            solved = tl.load(solved_at, mask=is_in[:, None], other=0.0)
            left = (wide * rate[:, None]).to(left.dtype)
            left = tl.dot(solved, left, input_precision="tf32x3").to(left.dtype)
            d_system = tl.dot(dx, tl.trans(left), d_system, input_precision="tf32x3")
        d_scores = tl.dot(g, tl.trans(left), d_scores, input_precision="tf32x3")
    gate_offs = start * decay_token + head * decay_head + t * decay_token
    decay = decay_between(running_decay(log_decay, gate_offs, count, CHUNK, HAS_DECAY), number, CHUNK)
    d_scores *= decay
    grad = tl.zeros([CHUNK], tl.float32)
    if IS_LEARNED or IS_DELTA:
        products, alike = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
        for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
            is_keys = is_in[:, None] & (at + i < K)[None, :]
            key = tl.load(k_base + at + k_place, mask=is_keys, other=0.0)
            if IS_LEARNED:
                query = tl.load(q_base + at + q_place, mask=is_keys, other=0.0)
                products = tl.dot(query, tl.trans(key), products, input_precision="tf32x3")
            if IS_DELTA:
                alike = tl.dot(key, tl.trans(key), alike, input_precision="tf32x3")
        pairs = tl.where(is_before, d_scores * products, 0.0)
        if IS_DELTA:
            d_system = tl.where(is_before, -d_system * decay, 0.0)
            d_rate += tl.sum(d_system * alike, axis=1)
            d_system *= rate[:, None]
            pairs += d_system * alike
            tl.store(grad_beta + own + t * heads, d_rate.to(grad_beta.dtype.element_ty), mask=is_in)
        if IS_LEARNED:
            # A gate is between j before it and i at or after it. Sums over just those: a sum over all i less
            # one over all j would leave the rounding of pairs that the gate is not between.
            found = tl.where(is_before, tl.cumsum(pairs, axis=0, reverse=True), 0.0)
            grad += tl.sum(found, axis=1)
    into = tl.load(decay_from_start + own + t * heads, mask=is_in, other=0.0)
    until = tl.load(decay_to_end + own + t * heads, mask=is_in, other=0.0)
    from_there, to_there = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    ends = tl.zeros([1], tl.float32)
    narrow = d_scores.to(q.dtype.element_ty)
    if IS_DELTA:
        both = (d_system + tl.trans(d_system)).to(q.dtype.element_ty)
    for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
        is_key = at + i < K
        is_keys = is_in[:, None] & is_key[None, :]
        dq, dk = tl.zeros([CHUNK, KEY_BLOCK], tl.float32), tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
        erased = tl.zeros([CHUNK, KEY_BLOCK], tl.float32)
        for value_at in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
            is_value = value_at + c < V
            is_values = is_in[:, None] & is_value[None, :]
            left = tl.load(x_base + value_at + x_place, mask=is_values, other=0.0)
            g = tl.load(g_base + value_at + values, mask=is_values, other=0.0)
            s_place = chunk * (K * V) + value_at + (at + i)[:, None] * V + c[None, :]
            is_state = is_key[:, None] & is_value[None, :]
            s = tl.load(states + s_place, mask=is_state, other=0.0)
            turned = tl.trans(s.to(g.dtype))
            dq = tl.dot(g, turned, dq, input_precision="tf32x3")
            if IS_DELTA:
                dx = tl.load(dx_base + value_at + values, mask=is_values, other=0.0)
                erased = tl.dot(dx, turned, erased, input_precision="tf32x3")
                solved = tl.load(solved_at, mask=is_in[:, None], other=0.0)
                left = (left.to(tl.float32) * rate[:, None]).to(left.dtype)
                left = tl.dot(solved, left, input_precision="tf32x3").to(left.dtype)
            ds = tl.load(grad_states + s_place, mask=is_state, other=0.0)
            dk = tl.dot(left, tl.trans(ds.to(g.dtype)), dk, input_precision="tf32x3")
            if IS_LEARNED:
                ends += tl.sum(tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=1), axis=0)
        query = tl.load(q_base + at + q_place, mask=is_keys, other=0.0)
        key = tl.load(k_base + at + k_place, mask=is_keys, other=0.0)
        dq *= into[:, None]
        dk *= until[:, None]
        if IS_LEARNED:
            from_there += tl.sum(dq * query.to(tl.float32), axis=1)
            to_there += tl.sum(dk * key.to(tl.float32), axis=1)
        if IS_DELTA:
            erased *= (-rate * into)[:, None]
            if IS_LEARNED:
                from_there += tl.sum(erased * key.to(tl.float32), axis=1)
            dk += erased
            dk = tl.dot(both, key, dk, input_precision="tf32x3")
        dq = tl.dot(narrow, key, dq, input_precision="tf32x3")
        dk = tl.dot(tl.trans(narrow), query, dk, input_precision="tf32x3")
        out_offs = own * K + at + t[:, None] * (heads * K) + i[None, :]
        tl.store(grad_q + out_offs, dq.to(grad_q.dtype.element_ty), mask=is_keys)
        tl.store(grad_k + out_offs, dk.to(grad_k.dtype.element_ty), mask=is_keys)
    if IS_LEARNED:
        grad += tl.sum(tl.where(is_before, to_there[None, :], from_there[None, :]), axis=1)
        grad += ends * tl.sum(tl.where(t == count - 1, into, 0.0), axis=0)
        tl.store(grad_decay + own + t * heads, grad.to(grad_decay.dtype.element_ty), mask=is_in)
