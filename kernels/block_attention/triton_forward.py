"""Attention over selected blocks in Triton, forward: a block with all queries that chose it, then their sum.

The first kernel leaves for each choice the normalised output over that block and its log-sum-exp. The second
one goes over a query's own block and merges the partial outputs, as split-KV decoding does (Flash-Decoding).
Both take the steps of FlashAttention-2 (arXiv 2307.08691, algorithm 1, lines 8 to 13), and their names:
s and p of a tile, m_i and l_i, m_new and alpha, acc. Scores, m_i and log-sum-exps are in base 2.

A row of a tile is a query head of a token: PADDED rows, a power of two, for the SHARED query heads of one
selection, or in `own` kernels for the OWN_SHARED ones of a key head. x_row, x_token, x_head: strides of x.
What belongs together comes as one tuple: `choices` as `triton_lists` makes them, `sizes` as `Sizes`.
chunk_first, chunk_last: tokens of the chunk whose partial outputs are in memory.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# A kernel's launch looks to pyright like a call of the Python function.

import triton
import triton.language as tl

from kernels.block_attention.triton_lists import (
    block_attention_choice_rows,
    block_attention_load,
    block_attention_load_rows,
    block_attention_products,
    block_attention_program,
    block_attention_token_rows,
)


@triton.jit(do_not_specialize=["chunk_first", "chunk"])
def block_attention_selected_forward(
    inputs, strides, choices, partial, partial_lse, sizes, chunk_first, chunk, scale_log2,
    SHARED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """For the choices of one block: the normalised output over that block, and its log-sum-exp."""
    q, k, v = inputs
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    starts, order, bounds, list_of_program, first_program = choices
    tokens, chunk_size, chunks, lists = sizes.tokens, sizes.chunk_size, sizes.chunks, sizes.lists
    slots, groups, selectors, num_selected = sizes.slots, sizes.groups, sizes.selectors, sizes.num_selected
    ITEMS: tl.constexpr = ROWS // PADDED
    list_id, begin, end = block_attention_program(
        list_of_program, first_program, bounds, lists, 1, chunk, chunks, ITEMS * STEPS
    )
    if list_id >= lists:
        return
    row, group, slot = list_id // (slots * groups), (list_id // slots) % groups, list_id % slots
    start = tl.load(starts + row * slots + slot).to(tl.int64)
    q += row.to(tl.int64) * q_row
    k += row.to(tl.int64) * k_row + start * k_token + group.to(tl.int64) * k_head
    v += row.to(tl.int64) * v_row + start * v_token + group.to(tl.int64) * v_head
    key, column = tl.arange(0, KEYS), tl.arange(0, V0)
    if BLOCK <= KEYS:
        # One tile of keys is loaded once for all of the choices.
        is_key = key < BLOCK
        k0, k1 = block_attention_load(k + key * k_token, is_key, KEY_DIM, K0, K1)
        v0 = block_attention_load_rows(v + key * v_token, is_key, VALUE_DIM, V0)
        for at in range(begin, end, ITEMS):
            token, selector, head, rank, is_in = block_attention_choice_rows(
                order, at, end, tokens, selectors, num_selected, SHARED, PADDED, ROWS
            )
            q_ptrs = q + token.to(tl.int64) * q_token + (selector * SHARED + head).to(tl.int64) * q_head
            q0, q1 = block_attention_load(q_ptrs, is_in, KEY_DIM, K0, K1)
            s = block_attention_products(q0, q1, k0, k1, K1) * scale_log2
            if BLOCK < KEYS:
                s = tl.where(is_key[None, :], s, float("-inf"))
            m_i = tl.max(s, axis=1)
            p = tl.exp2(s - m_i[:, None])
            l_i = tl.sum(p, axis=1)
            out = tl.dot(p.to(v0.dtype), v0, input_precision="tf32x3") / l_i[:, None]
            partial_row = (row.to(tl.int64) * chunk_size + token - chunk_first) * selectors + selector
            partial_row = (partial_row * num_selected + rank) * SHARED + head
            is_out = is_in[:, None] & (column < VALUE_DIM)[None, :]
            tl.store(
                partial + partial_row[:, None] * VALUE_DIM + column[None, :],
                out.to(partial.dtype.element_ty),
                mask=is_out,
            )
            tl.store(partial_lse + partial_row, m_i + tl.log2(l_i), mask=is_in)
    else:
        tl.static_assert(STEPS == 1, "one tile of choices for each program")
        token, selector, head, rank, is_in = block_attention_choice_rows(
            order, begin, end, tokens, selectors, num_selected, SHARED, PADDED, ROWS
        )
        q_ptrs = q + token.to(tl.int64) * q_token + (selector * SHARED + head).to(tl.int64) * q_head
        q0, q1 = block_attention_load(q_ptrs, is_in, KEY_DIM, K0, K1)
        m_i = tl.full([ROWS], float("-inf"), tl.float32)
        l_i = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, V0], tl.float32)
        for first in range(0, BLOCK, KEYS):
            is_key = first + key < BLOCK
            at_key = first + key
            k0, k1 = block_attention_load(k + at_key * k_token, is_key, KEY_DIM, K0, K1)
            v0 = block_attention_load_rows(v + at_key * v_token, is_key, VALUE_DIM, V0)
            s = block_attention_products(q0, q1, k0, k1, K1) * scale_log2
            if BLOCK % KEYS:
                s = tl.where(is_key[None, :], s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, axis=1))
            p = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v0.dtype), v0, acc * alpha[:, None], input_precision="tf32x3")
            m_i = m_new
        partial_row = (row.to(tl.int64) * chunk_size + token - chunk_first) * selectors + selector
        partial_row = (partial_row * num_selected + rank) * SHARED + head
        is_out = is_in[:, None] & (column < VALUE_DIM)[None, :]
        out = acc / l_i[:, None]
        tl.store(
            partial + partial_row[:, None] * VALUE_DIM + column[None, :],
            out.to(partial.dtype.element_ty),
            mask=is_out,
        )
        tl.store(partial_lse + partial_row, m_i + tl.log2(l_i), mask=is_in)


@triton.jit(do_not_specialize=["chunk_first", "chunk_last"])
def block_attention_own_forward(
    inputs, strides, own_starts, q_index, selected, partial, partial_lse, outputs, sizes,
    chunk_first, chunk_last, scale_log2,
    SHARED: tl.constexpr, OWN_SHARED: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr, HAS_Q_INDEX: tl.constexpr,
):  # fmt: skip
    """Consecutive queries over their own blocks, merged with the partial outputs of the blocks they chose.

    q_index: index of each query in its row of keys; without, query t is key t. mass: the attention
    probability of the own block and of each selected one, summed over the heads of a selection.
    """
    q, k, v = inputs
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    out, lse, mass = outputs
    tokens, chunk_size, heads = sizes.tokens, sizes.chunk_size, sizes.heads
    groups, selectors, num_selected = sizes.groups, sizes.selectors, sizes.num_selected
    first = chunk_first + tl.program_id(0) * (ROWS // PADDED)
    last = tl.minimum(first + ROWS // PADDED, chunk_last)
    row, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    token, head, is_in = block_attention_token_rows(first, last, group, OWN_SHARED, PADDED, ROWS)
    batch = row.to(tl.int64)
    q_ptrs = q + batch * q_row + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    q0, q1 = block_attention_load(q_ptrs, is_in, KEY_DIM, K0, K1)
    k += batch * k_row + group.to(tl.int64) * k_head
    v += batch * v_row + group.to(tl.int64) * v_head
    own_start = tl.load(own_starts + batch * tokens + token, mask=is_in, other=2147483647)
    q_key, stop = token, last
    if HAS_Q_INDEX:
        q_key = tl.load(q_index + batch * tokens + token, mask=is_in, other=-1)
        stop = tl.load(q_index + batch * tokens + last - 1) + 1
    key, column = tl.arange(0, KEYS), tl.arange(0, V0)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V0], tl.float32)
    # The own block of a later query starts no earlier.
    for at in range(tl.load(own_starts + batch * tokens + first), stop, KEYS):
        at_key = at + key
        k0, k1 = block_attention_load(k + at_key.to(tl.int64) * k_token, at_key < stop, KEY_DIM, K0, K1)
        v0 = block_attention_load_rows(v + at_key.to(tl.int64) * v_token, at_key < stop, VALUE_DIM, V0)
        s = block_attention_products(q0, q1, k0, k1, K1) * scale_log2
        is_seen = (at_key[None, :] <= q_key[:, None]) & (at_key[None, :] >= own_start[:, None])
        s = tl.where(is_seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v0.dtype), v0, acc * alpha[:, None], input_precision="tf32x3")
        m_i = m_new
    # Rows that do not exist go on as if they saw one key, so that no NaN arises.
    m_i, l_i = tl.where(is_in, m_i, 0.0), tl.where(is_in, l_i, 1.0)
    own_lse = m_i + tl.log2(l_i)
    selector = head // SHARED
    choice = ((batch * tokens + token) * selectors + selector) * num_selected
    partial_row = ((batch * chunk_size + token - chunk_first) * selectors + selector) * num_selected
    m_i_all, l_i_all = own_lse, tl.full([ROWS], 1.0, tl.float32)
    for rank in range(num_selected):
        is_selected = is_in & (tl.load(selected + choice + rank, mask=is_in, other=-1) >= 0)
        selected_row = (partial_row + rank) * SHARED + head % SHARED
        selected_lse = tl.load(partial_lse + selected_row, mask=is_selected, other=float("-inf"))
        m_new = tl.maximum(m_i_all, selected_lse)
        l_i_all = l_i_all * tl.exp2(m_i_all - m_new) + tl.exp2(selected_lse - m_new)
        m_i_all = m_new
    lse_i = m_i_all + tl.log2(l_i_all)
    acc *= tl.exp2(m_i - lse_i)[:, None]
    token_in = first + tl.arange(0, ROWS // PADDED)
    if OWN_SHARED == SHARED:
        mass_ptrs = mass + ((batch * tokens + token_in) * selectors + group) * (num_selected + 1)
        own_p = tl.where(is_in, tl.exp2(own_lse - lse_i), 0.0)
        tl.store(mass_ptrs, tl.sum(own_p.reshape(ROWS // PADDED, PADDED), axis=1), mask=token_in < last)
    else:
        mass_ptrs = mass + ((batch * tokens + token) * selectors + selector) * (num_selected + 1)
        tl.store(mass_ptrs, tl.exp2(own_lse - lse_i), mask=is_in)
    for rank in range(num_selected):
        is_selected = is_in & (tl.load(selected + choice + rank, mask=is_in, other=-1) >= 0)
        selected_row = (partial_row + rank) * SHARED + head % SHARED
        selected_lse = tl.load(partial_lse + selected_row, mask=is_selected, other=float("-inf"))
        selected_p = tl.exp2(selected_lse - lse_i)
        is_out = is_selected[:, None] & (column < VALUE_DIM)[None, :]
        selected_out = tl.load(
            partial + selected_row[:, None] * VALUE_DIM + column[None, :], mask=is_out, other=0.0
        )
        acc += selected_p[:, None] * selected_out.to(tl.float32)
        if OWN_SHARED == SHARED:
            p_of_heads = tl.sum(selected_p.reshape(ROWS // PADDED, PADDED), axis=1)
            tl.store(mass_ptrs + 1 + rank, p_of_heads, mask=token_in < last)
        else:
            tl.store(mass_ptrs + 1 + rank, selected_p, mask=is_in)
    row_index = (batch * tokens + token) * heads + head
    is_out = is_in[:, None] & (column < VALUE_DIM)[None, :]
    out_ptrs = out + row_index[:, None] * VALUE_DIM + column[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=is_out)
    tl.store(lse + row_index, lse_i, mask=is_in)
