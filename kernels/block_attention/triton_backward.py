"""Attention over selected blocks in Triton, backward; arguments are named as in `triton_forward`.

Steps and names are those of FlashAttention-2 (arXiv 2307.08691, algorithm 2, lines 4 and 10 to 16): delta,
p = exp(s - lse), dp, ds = p (dp - delta). For dk and dv a program holds a tile of a block's keys and goes
over the queries that chose it. For dq each choice leaves a partial gradient, and a query sums those of its
choices in order of rank. scale_log2: the scale for scores in base 2.
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
    block_attention_store,
    block_attention_token_rows,
)


@triton.jit
def block_attention_delta(out, do, delta, rows, VALUE_DIM: tl.constexpr, V0: tl.constexpr,
                          ROWS: tl.constexpr):  # fmt: skip
    """delta = rowsum(do o)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_in = row < rows
    o = block_attention_load_rows(out + row * VALUE_DIM, is_in, VALUE_DIM, V0)
    do0 = block_attention_load_rows(do + row * VALUE_DIM, is_in, VALUE_DIM, V0)
    tl.store(delta + row, tl.sum(o.to(tl.float32) * do0.to(tl.float32), axis=1), mask=is_in)


@triton.jit
def block_attention_p_ds_transposed(
    q0, q1, do0, k0, k1, v0, lse_i, delta_i, is_seen, scale_log2,
    K1: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """p^T and ds^T, keys by queries, ds before the scale; zero where is_seen is false."""
    s = block_attention_products(k0, k1, q0, q1, K1) * scale_log2 - lse_i[None, :]
    if IS_MASKED:
        s = tl.where(is_seen, s, float("-inf"))
    p = tl.exp2(s)
    dp = tl.dot(v0, tl.trans(do0), input_precision="tf32x3")
    return p, p * (dp - delta_i[None, :])


@triton.jit
def block_attention_selected_dkv(
    inputs, strides, choices, partial, sizes, scale_log2, scale,
    SHARED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of a block's keys from at most CHOICES of the queries that chose the block."""
    q, k, v, do, lse, delta = inputs
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    starts, order, bounds, list_of_program, first_program = choices
    tokens, chunks, lists, slots = sizes.tokens, sizes.chunks, sizes.lists, sizes.slots
    heads, groups, selectors, num_selected = sizes.heads, sizes.groups, sizes.selectors, sizes.num_selected
    ITEMS: tl.constexpr = ROWS // PADDED
    list_id, begin, end = block_attention_program(
        list_of_program, first_program, bounds, lists, chunks, 0, chunks, CHOICES
    )
    if list_id >= lists:
        return
    row, group, slot = list_id // (slots * groups), (list_id // slots) % groups, list_id % slots
    batch = row.to(tl.int64)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    is_key = key < BLOCK
    start = tl.load(starts + row * slots + slot).to(tl.int64)
    k += batch * k_row + start * k_token + group.to(tl.int64) * k_head
    v += batch * v_row + start * v_token + group.to(tl.int64) * v_head
    k0, k1 = block_attention_load(k + key * k_token, is_key, KEY_DIM, K0, K1)
    v0 = block_attention_load_rows(v + key * v_token, is_key, VALUE_DIM, V0)
    dk0, dv0 = tl.zeros([KEYS, K0], tl.float32), tl.zeros([KEYS, V0], tl.float32)
    dk1 = tl.zeros([KEYS, K1 if K1 else 1], tl.float32)
    q += batch * q_row
    for at in range(begin, end, ITEMS):
        token, selector, head, _, is_in = block_attention_choice_rows(
            order, at, end, tokens, selectors, num_selected, SHARED, PADDED, ROWS
        )
        head += selector * SHARED
        row_index = (batch * tokens + token) * heads + head
        q_ptrs = q + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
        q0, q1 = block_attention_load(q_ptrs, is_in, KEY_DIM, K0, K1)
        do0 = block_attention_load_rows(do + row_index * VALUE_DIM, is_in, VALUE_DIM, V0)
        # p of rows that do not exist becomes zero.
        lse_i = tl.load(lse + row_index, mask=is_in, other=float("inf"))
        delta_i = tl.load(delta + row_index, mask=is_in, other=0.0)
        p, ds = block_attention_p_ds_transposed(
            q0, q1, do0, k0, k1, v0, lse_i, delta_i, is_key[:, None], scale_log2,
            K1, BLOCK % KEYS != 0,
        )  # fmt: skip
        dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision="tf32x3")
        ds = ds.to(do0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision="tf32x3")
        if K1:
            dk1 = tl.dot(ds, q1, dk1, input_precision="tf32x3")
    partial_ptrs = partial + (tl.program_id(0).to(tl.int64) * BLOCK + key) * (KEY_DIM + VALUE_DIM)
    block_attention_store(partial_ptrs, dk0 * scale, dk1 * scale, is_key, KEY_DIM, K0, K1)
    block_attention_store(partial_ptrs + KEY_DIM, dv0, dv0, is_key, VALUE_DIM, V0, 0)


@triton.jit
def block_attention_own_dkv(
    inputs, strides, own_blocks, starts, first_program, partial, dk, dv, sizes, keys, scale_log2, scale,
    SHARED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr, HAS_SELECTED: tl.constexpr,
    HAS_Q_INDEX: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys: from the queries of their own block, and the partial sums of all others.

    own_blocks: as `OwnBlocks`.
    """
    q, k, v, do, lse, delta = inputs
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    own_starts, q_index, own_starts_of_keys, queries_before = own_blocks
    tokens, slots = sizes.tokens, sizes.slots
    heads, groups = sizes.heads, sizes.groups
    ITEMS: tl.constexpr = ROWS // PADDED
    first = tl.program_id(0) * KEYS
    row, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    batch = row.to(tl.int64)
    key = first + tl.arange(0, KEYS)
    is_key = key < keys
    at_key = key.to(tl.int64)
    k += batch * k_row + group.to(tl.int64) * k_head
    v += batch * v_row + group.to(tl.int64) * v_head
    k0, k1 = block_attention_load(k + at_key * k_token, is_key, KEY_DIM, K0, K1)
    v0 = block_attention_load_rows(v + at_key * v_token, is_key, VALUE_DIM, V0)
    dk0, dv0 = tl.zeros([KEYS, K0], tl.float32), tl.zeros([KEYS, V0], tl.float32)
    dk1 = tl.zeros([KEYS, K1 if K1 else 1], tl.float32)
    own_starts += batch * tokens
    own_starts_of_keys += batch * keys
    # No query after the last key's block sees it as its own block.
    begin, end = (
        first,
        tl.minimum(tl.load(own_starts_of_keys + tl.minimum(first + KEYS, keys) - 1) + BLOCK, keys),
    )
    if HAS_Q_INDEX:
        queries_before += batch * (keys + 1)
        begin, end = tl.load(queries_before + begin), tl.load(queries_before + end)
    for at in range(begin, end, ITEMS):
        token, head, is_in = block_attention_token_rows(at, end, group, SHARED, PADDED, ROWS)
        own_start = tl.load(own_starts + token, mask=is_in, other=0)
        row_index = (batch * tokens + token) * heads + head
        q_ptrs = q + batch * q_row + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
        q0, q1 = block_attention_load(q_ptrs, is_in, KEY_DIM, K0, K1)
        do0 = block_attention_load_rows(do + row_index * VALUE_DIM, is_in, VALUE_DIM, V0)
        lse_i = tl.load(lse + row_index, mask=is_in, other=0.0)
        delta_i = tl.load(delta + row_index, mask=is_in, other=0.0)
        q_key = token
        if HAS_Q_INDEX:
            q_key = tl.load(q_index + batch * tokens + token, mask=is_in, other=-1)
        is_seen = is_in[None, :] & (key[:, None] <= q_key[None, :]) & (key[:, None] >= own_start[None, :])
        p, ds = block_attention_p_ds_transposed(
            q0, q1, do0, k0, k1, v0, lse_i, delta_i, is_seen, scale_log2, K1, True
        )
        dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision="tf32x3")
        ds = ds.to(do0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision="tf32x3")
        if K1:
            dk1 = tl.dot(ds, q1, dk1, input_precision="tf32x3")
    dk0, dk1 = dk0 * scale, dk1 * scale
    if HAS_SELECTED:
        # The key's own block, if it is complete; others cannot be selected.
        own_start = tl.load(own_starts_of_keys + key, mask=is_key, other=0)
        slot = own_start // BLOCK
        is_block = is_key & (slot < slots)
        start = tl.load(starts + row * slots + slot, mask=is_block, other=-1)
        is_block = is_block & (start == own_start)
        list_id = (row * groups + group) * slots + slot
        program = tl.load(first_program + list_id, mask=is_block, other=0)
        last_program = tl.load(first_program + list_id + 1, mask=is_block, other=0)
        for _ in range(tl.max(last_program - program, axis=0)):
            partial_index = (program.to(tl.int64) * BLOCK + key - own_start) * (KEY_DIM + VALUE_DIM)
            is_program = program < last_program
            part0, part1 = block_attention_load(partial + partial_index, is_program, KEY_DIM, K0, K1)
            dk0 += part0
            if K1:
                dk1 += part1
            part0 = block_attention_load_rows(partial + partial_index + KEY_DIM, is_program, VALUE_DIM, V0)
            dv0 += part0
            program += 1
    row_index = (batch * keys + key) * groups + group
    block_attention_store(dk + row_index * KEY_DIM, dk0, dk1, is_key, KEY_DIM, K0, K1)
    block_attention_store(dv + row_index * VALUE_DIM, dv0, dv0, is_key, VALUE_DIM, V0, 0)


@triton.jit(do_not_specialize=["chunk_first", "chunk"])
def block_attention_selected_dq(
    inputs, strides, choices, partial, sizes, chunk_first, chunk, scale_log2,
    SHARED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Partial dq, before the scale, of the queries that chose a block, from that block."""
    q, k, v, do, lse, delta = inputs
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    starts, order, bounds, list_of_program, first_program = choices
    tokens, chunk_size, chunks, lists, slots, heads, groups, selectors, num_selected = sizes
    ITEMS: tl.constexpr = ROWS // PADDED
    list_id, begin, end = block_attention_program(
        list_of_program, first_program, bounds, lists, 1, chunk, chunks, ITEMS * STEPS
    )
    if list_id >= lists:
        return
    row, group, slot = list_id // (slots * groups), (list_id // slots) % groups, list_id % slots
    batch = row.to(tl.int64)
    start = tl.load(starts + row * slots + slot).to(tl.int64)
    q += batch * q_row
    k += batch * k_row + start * k_token + group.to(tl.int64) * k_head
    v += batch * v_row + start * v_token + group.to(tl.int64) * v_head
    key = tl.arange(0, KEYS)
    if BLOCK <= KEYS:
        is_key = key < BLOCK
        k0, k1 = block_attention_load(k + key * k_token, is_key, KEY_DIM, K0, K1)
        v0 = block_attention_load_rows(v + key * v_token, is_key, VALUE_DIM, V0)
    for at in range(begin, end, ITEMS):
        token, selector, head, rank, is_in = block_attention_choice_rows(
            order, at, end, tokens, selectors, num_selected, SHARED, PADDED, ROWS
        )
        partial_row = (batch * chunk_size + token - chunk_first) * selectors + selector
        partial_row = (partial_row * num_selected + rank) * SHARED + head
        head += selector * SHARED
        row_index = (batch * tokens + token) * heads + head
        q_ptrs = q + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
        q0, q1 = block_attention_load(q_ptrs, is_in, KEY_DIM, K0, K1)
        do0 = block_attention_load_rows(do + row_index * VALUE_DIM, is_in, VALUE_DIM, V0)
        lse_i = tl.load(lse + row_index, mask=is_in, other=0.0)
        delta_i = tl.load(delta + row_index, mask=is_in, other=0.0)
        if BLOCK <= KEYS:
            ds = block_attention_ds(
                q0, q1, do0, k0, k1, v0, lse_i, delta_i, is_key[None, :], scale_log2,
                K1, BLOCK < KEYS,
            )  # fmt: skip
            dq0 = tl.dot(ds, k0, input_precision="tf32x3")
            dq1 = tl.dot(ds, k1, input_precision="tf32x3") if K1 else dq0
        else:
            dq0 = tl.zeros([ROWS, K0], tl.float32)
            dq1 = tl.zeros([ROWS, K1 if K1 else 1], tl.float32)
            for first in range(0, BLOCK, KEYS):
                is_key = first + key < BLOCK
                at_key = first + key
                k0, k1 = block_attention_load(k + at_key * k_token, is_key, KEY_DIM, K0, K1)
                v0 = block_attention_load_rows(v + at_key * v_token, is_key, VALUE_DIM, V0)
                ds = block_attention_ds(
                    q0, q1, do0, k0, k1, v0, lse_i, delta_i, is_key[None, :], scale_log2,
                    K1, BLOCK % KEYS != 0,
                )  # fmt: skip
                dq0 = tl.dot(ds, k0, dq0, input_precision="tf32x3")
                if K1:
                    dq1 = tl.dot(ds, k1, dq1, input_precision="tf32x3")
        block_attention_store(partial + partial_row * KEY_DIM, dq0, dq1, is_in, KEY_DIM, K0, K1)


@triton.jit
def block_attention_ds(
    q0, q1, do0, k0, k1, v0, lse_i, delta_i, is_seen, scale_log2,
    K1: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """ds, queries by keys, before the scale and in the dtype of do0; zero where is_seen is false."""
    s = block_attention_products(q0, q1, k0, k1, K1) * scale_log2 - lse_i[:, None]
    if IS_MASKED:
        s = tl.where(is_seen, s, float("-inf"))
    p = tl.exp2(s)
    dp = tl.dot(do0, tl.trans(v0), input_precision="tf32x3")
    return (p * (dp - delta_i[:, None])).to(do0.dtype)


@triton.jit(do_not_specialize=["chunk_first", "chunk_last"])
def block_attention_own_dq(
    inputs, strides, own_starts, q_index, selected, partial, dq, sizes, chunk_first, chunk_last,
    scale_log2, scale,
    SHARED: tl.constexpr, OWN_SHARED: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    VALUE_DIM: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr, HAS_Q_INDEX: tl.constexpr,
):  # fmt: skip
    """dq of consecutive queries: from their own blocks, and the partial dq of the blocks they chose."""
    q, k, v, do, lse, delta = inputs
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    tokens, chunk_size, heads = sizes.tokens, sizes.chunk_size, sizes.heads
    groups, selectors, num_selected = sizes.groups, sizes.selectors, sizes.num_selected
    first = chunk_first + tl.program_id(0) * (ROWS // PADDED)
    last = tl.minimum(first + ROWS // PADDED, chunk_last)
    row, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    token, head, is_in = block_attention_token_rows(first, last, group, OWN_SHARED, PADDED, ROWS)
    batch = row.to(tl.int64)
    row_index = (batch * tokens + token) * heads + head
    q_ptrs = q + batch * q_row + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    q0, q1 = block_attention_load(q_ptrs, is_in, KEY_DIM, K0, K1)
    do0 = block_attention_load_rows(do + row_index * VALUE_DIM, is_in, VALUE_DIM, V0)
    lse_i = tl.load(lse + row_index, mask=is_in, other=0.0)
    delta_i = tl.load(delta + row_index, mask=is_in, other=0.0)
    own_start = tl.load(own_starts + batch * tokens + token, mask=is_in, other=2147483647)
    q_key, stop = token, last
    if HAS_Q_INDEX:
        q_key = tl.load(q_index + batch * tokens + token, mask=is_in, other=-1)
        stop = tl.load(q_index + batch * tokens + last - 1) + 1
    k += batch * k_row + group.to(tl.int64) * k_head
    v += batch * v_row + group.to(tl.int64) * v_head
    key = tl.arange(0, KEYS)
    dq0 = tl.zeros([ROWS, K0], tl.float32)
    dq1 = tl.zeros([ROWS, K1 if K1 else 1], tl.float32)
    for at in range(tl.load(own_starts + batch * tokens + first), stop, KEYS):
        at_key = at + key
        k0, k1 = block_attention_load(k + at_key.to(tl.int64) * k_token, at_key < stop, KEY_DIM, K0, K1)
        v0 = block_attention_load_rows(v + at_key.to(tl.int64) * v_token, at_key < stop, VALUE_DIM, V0)
        is_seen = (at_key[None, :] <= q_key[:, None]) & (at_key[None, :] >= own_start[:, None])
        ds = block_attention_ds(q0, q1, do0, k0, k1, v0, lse_i, delta_i, is_seen, scale_log2, K1, True)
        dq0 = tl.dot(ds, k0, dq0, input_precision="tf32x3")
        if K1:
            dq1 = tl.dot(ds, k1, dq1, input_precision="tf32x3")
    selector = head // SHARED
    choice = ((batch * tokens + token) * selectors + selector) * num_selected
    partial_row = ((batch * chunk_size + token - chunk_first) * selectors + selector) * num_selected
    for rank in range(num_selected):
        is_selected = is_in & (tl.load(selected + choice + rank, mask=is_in, other=-1) >= 0)
        selected_row = (partial_row + rank) * SHARED + head % SHARED
        part0, part1 = block_attention_load(partial + selected_row * KEY_DIM, is_selected, KEY_DIM, K0, K1)
        dq0 += part0.to(tl.float32)
        if K1:
            dq1 += part1.to(tl.float32)
    dq0, dq1 = dq0 * scale, dq1 * scale
    block_attention_store(dq + row_index * KEY_DIM, dq0, dq1, is_in, KEY_DIM, K0, K1)
