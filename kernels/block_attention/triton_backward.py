"""Gradients of attention over selected blocks as Triton kernels; letters as in `triton_forward`.

Gradients of keys and values: one program holds a tile of a block's keys and walks through the queries that
chose it. Gradients of queries: partial rows for each choice, summed in the order of places.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# A kernel's launch looks to pyright like a call of the Python function.

import triton
import triton.language as tl

from kernels.block_attention.triton_lists import (
    block_attention_line,
    block_attention_load,
    block_attention_part,
    block_attention_products,
    block_attention_rows,
    block_attention_side,
    block_attention_store,
)


@triton.jit
def block_attention_delta(out, grad, delta, rows, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr,
                          ROWS: tl.constexpr):  # fmt: skip
    """The product of each output with its gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_in = row < rows
    x = block_attention_line(out + row * VALUE_DIM, is_in, VALUE_DIM, VALUES)
    g = block_attention_line(grad + row * VALUE_DIM, is_in, VALUE_DIM, VALUES)
    tl.store(delta + row, tl.sum(x.to(tl.float32) * g.to(tl.float32), axis=1), mask=is_in)


@triton.jit
def block_attention_pull(
    q_low, q_high, g, k_low, k_high, v_low, lse, delta, is_seen, scale,
    HIGH: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Keys by queries: weights, and gradients of scores before the scale; both zero where nothing is seen."""
    s = block_attention_products(k_low, k_high, q_low, q_high, HIGH) * scale - lse[None, :]
    if IS_MASKED:
        s = tl.where(is_seen, s, float("-inf"))
    p = tl.exp2(s)
    pull = tl.dot(v_low, tl.trans(g), input_precision="tf32x3")
    return p, p * (pull - delta[None, :])


@triton.jit
def block_attention_far_keys(
    q, k, v, grad, lse, delta, starts, order, bounds, owner, before, partial,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    tokens, slabs, lists, slots, heads, groups, selectors, places, scale, plain_scale,
    SHARED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The part of at most SHARE choices of a block in the gradients of a tile of its keys and values."""
    ITEMS: tl.constexpr = ROWS // PADDED
    found, begin, end = block_attention_part(owner, before, bounds, lists, slabs, 0, slabs, SHARE)
    if found >= lists:
        return
    row, group, slot = found // (slots * groups), (found // slots) % groups, found % slots
    batch = row.to(tl.int64)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    is_key = key < BLOCK
    start = tl.load(starts + row * slots + slot).to(tl.int64)
    k += batch * k_row + start * k_token + group.to(tl.int64) * k_head
    v += batch * v_row + start * v_token + group.to(tl.int64) * v_head
    k_low, k_high = block_attention_load(k + key * k_token, is_key, KEY_DIM, LOW, HIGH)
    v_low = block_attention_line(v + key * v_token, is_key, VALUE_DIM, VALUES)
    low, values = tl.zeros([KEYS, LOW], tl.float32), tl.zeros([KEYS, VALUES], tl.float32)
    high = tl.zeros([KEYS, HIGH if HIGH else 1], tl.float32)
    q += batch * q_row
    for at in range(begin, end, ITEMS):
        token, selector, head, _, is_in = block_attention_rows(
            order, at, end, tokens, selectors, places, SHARED, PADDED, ROWS
        )
        head += selector * SHARED
        line = (batch * tokens + token) * heads + head
        source = q + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
        q_low, q_high = block_attention_load(source, is_in, KEY_DIM, LOW, HIGH)
        g = block_attention_line(grad + line * VALUE_DIM, is_in, VALUE_DIM, VALUES)
        # Weights of rows that are none become zero.
        level = tl.load(lse + line, mask=is_in, other=float("inf"))
        pull = tl.load(delta + line, mask=is_in, other=0.0)
        p, by = block_attention_pull(
            q_low, q_high, g, k_low, k_high, v_low, level, pull, is_key[:, None], scale,
            HIGH, BLOCK % KEYS != 0,
        )  # fmt: skip
        values = tl.dot(p.to(g.dtype), g, values, input_precision="tf32x3")
        by = by.to(g.dtype)
        low = tl.dot(by, q_low, low, input_precision="tf32x3")
        if HIGH:
            high = tl.dot(by, q_high, high, input_precision="tf32x3")
    target = partial + (tl.program_id(0).to(tl.int64) * BLOCK + key) * (KEY_DIM + VALUE_DIM)
    block_attention_store(target, low * plain_scale, high * plain_scale, is_key, KEY_DIM, LOW, HIGH)
    block_attention_store(target + KEY_DIM, values, values, is_key, VALUE_DIM, VALUES, 0)


@triton.jit
def block_attention_near_keys(
    q, k, v, grad, lse, delta, own, places_of, own_of_keys, readers, starts, before, partial, grad_k, grad_v,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    tokens, keys, lists, slots, heads, groups, scale, plain_scale,
    SHARED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, HAS_FAR: tl.constexpr,
    HAS_PLACES: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: from queries of their own blocks, and the parts of others.

    readers: for each key, and the end of the row, how many queries stand before it.
    """
    ITEMS: tl.constexpr = ROWS // PADDED
    first = tl.program_id(0) * KEYS
    row, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    batch = row.to(tl.int64)
    key = first + tl.arange(0, KEYS)
    is_key = key < keys
    at_key = key.to(tl.int64)
    k += batch * k_row + group.to(tl.int64) * k_head
    v += batch * v_row + group.to(tl.int64) * v_head
    k_low, k_high = block_attention_load(k + at_key * k_token, is_key, KEY_DIM, LOW, HIGH)
    v_low = block_attention_line(v + at_key * v_token, is_key, VALUE_DIM, VALUES)
    low, values = tl.zeros([KEYS, LOW], tl.float32), tl.zeros([KEYS, VALUES], tl.float32)
    high = tl.zeros([KEYS, HIGH if HIGH else 1], tl.float32)
    own += batch * tokens
    own_of_keys += batch * keys
    # The last key is seen by no query behind its block.
    begin, end = first, tl.minimum(tl.load(own_of_keys + tl.minimum(first + KEYS, keys) - 1) + BLOCK, keys)
    if HAS_PLACES:
        readers += batch * (keys + 1)
        begin, end = tl.load(readers + begin), tl.load(readers + end)
    for at in range(begin, end, ITEMS):
        token, head, is_in = block_attention_side(at, end, group, SHARED, PADDED, ROWS)
        opened = tl.load(own + token, mask=is_in, other=0)
        line = (batch * tokens + token) * heads + head
        source = q + batch * q_row + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
        q_low, q_high = block_attention_load(source, is_in, KEY_DIM, LOW, HIGH)
        g = block_attention_line(grad + line * VALUE_DIM, is_in, VALUE_DIM, VALUES)
        level = tl.load(lse + line, mask=is_in, other=0.0)
        pull = tl.load(delta + line, mask=is_in, other=0.0)
        stands = token
        if HAS_PLACES:
            stands = tl.load(places_of + batch * tokens + token, mask=is_in, other=-1)
        is_seen = is_in[None, :] & (key[:, None] <= stands[None, :]) & (key[:, None] >= opened[None, :])
        p, by = block_attention_pull(
            q_low, q_high, g, k_low, k_high, v_low, level, pull, is_seen, scale, HIGH, True
        )
        values = tl.dot(p.to(g.dtype), g, values, input_precision="tf32x3")
        by = by.to(g.dtype)
        low = tl.dot(by, q_low, low, input_precision="tf32x3")
        if HIGH:
            high = tl.dot(by, q_high, high, input_precision="tf32x3")
    low, high = low * plain_scale, high * plain_scale
    if HAS_FAR:
        # The block that starts where this key's own one does, if that is complete.
        opened = tl.load(own_of_keys + key, mask=is_key, other=0)
        slot = opened // BLOCK
        is_block = is_key & (slot < slots)
        start = tl.load(starts + row * slots + slot, mask=is_block, other=-1)
        is_block = is_block & (start == opened)
        listed = (row * groups + group) * slots + slot
        part = tl.load(before + listed, mask=is_block, other=0)
        stop = tl.load(before + listed + 1, mask=is_block, other=0)
        for _ in range(tl.max(stop - part, axis=0)):
            line = (part.to(tl.int64) * BLOCK + key - opened) * (KEY_DIM + VALUE_DIM)
            is_part = part < stop
            more, higher = block_attention_load(partial + line, is_part, KEY_DIM, LOW, HIGH)
            low += more
            if HIGH:
                high += higher
            more = block_attention_line(partial + line + KEY_DIM, is_part, VALUE_DIM, VALUES)
            values += more
            part += 1
    line = (batch * keys + key) * groups + group
    block_attention_store(grad_k + line * KEY_DIM, low, high, is_key, KEY_DIM, LOW, HIGH)
    block_attention_store(grad_v + line * VALUE_DIM, values, values, is_key, VALUE_DIM, VALUES, 0)


@triton.jit(do_not_specialize=["slab_first", "slab"])
def block_attention_far_query(
    q, k, v, grad, lse, delta, starts, order, bounds, owner, before, partial,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    tokens, slab_first, slab_size, slab, slabs, lists, slots, heads, groups, selectors, places, scale,
    SHARED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The part of a block in the gradients of the queries that chose it, before the scale."""
    ITEMS: tl.constexpr = ROWS // PADDED
    found, begin, end = block_attention_part(owner, before, bounds, lists, 1, slab, slabs, ITEMS * STEPS)
    if found >= lists:
        return
    row, group, slot = found // (slots * groups), (found // slots) % groups, found % slots
    batch = row.to(tl.int64)
    start = tl.load(starts + row * slots + slot).to(tl.int64)
    q += batch * q_row
    k += batch * k_row + start * k_token + group.to(tl.int64) * k_head
    v += batch * v_row + start * v_token + group.to(tl.int64) * v_head
    key = tl.arange(0, KEYS)
    if BLOCK <= KEYS:
        is_key = key < BLOCK
        k_low, k_high = block_attention_load(k + key * k_token, is_key, KEY_DIM, LOW, HIGH)
        v_low = block_attention_line(v + key * v_token, is_key, VALUE_DIM, VALUES)
    for at in range(begin, end, ITEMS):
        token, selector, head, place, is_in = block_attention_rows(
            order, at, end, tokens, selectors, places, SHARED, PADDED, ROWS
        )
        target = (batch * slab_size + token - slab_first) * selectors + selector
        target = (target * places + place) * SHARED + head
        head += selector * SHARED
        line = (batch * tokens + token) * heads + head
        source = q + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
        q_low, q_high = block_attention_load(source, is_in, KEY_DIM, LOW, HIGH)
        g = block_attention_line(grad + line * VALUE_DIM, is_in, VALUE_DIM, VALUES)
        level = tl.load(lse + line, mask=is_in, other=0.0)
        pull = tl.load(delta + line, mask=is_in, other=0.0)
        if BLOCK <= KEYS:
            by = block_attention_push(
                q_low, q_high, g, k_low, k_high, v_low, level, pull, is_key[None, :], scale,
                HIGH, BLOCK < KEYS,
            )  # fmt: skip
            low = tl.dot(by, k_low, input_precision="tf32x3")
            high = tl.dot(by, k_high, input_precision="tf32x3") if HIGH else low
        else:
            low = tl.zeros([ROWS, LOW], tl.float32)
            high = tl.zeros([ROWS, HIGH if HIGH else 1], tl.float32)
            for first in range(0, BLOCK, KEYS):
                is_key = first + key < BLOCK
                at_key = first + key
                k_low, k_high = block_attention_load(k + at_key * k_token, is_key, KEY_DIM, LOW, HIGH)
                v_low = block_attention_line(v + at_key * v_token, is_key, VALUE_DIM, VALUES)
                by = block_attention_push(
                    q_low, q_high, g, k_low, k_high, v_low, level, pull, is_key[None, :], scale,
                    HIGH, BLOCK % KEYS != 0,
                )  # fmt: skip
                low = tl.dot(by, k_low, low, input_precision="tf32x3")
                if HIGH:
                    high = tl.dot(by, k_high, high, input_precision="tf32x3")
        block_attention_store(partial + target * KEY_DIM, low, high, is_in, KEY_DIM, LOW, HIGH)


@triton.jit
def block_attention_push(
    q_low, q_high, g, k_low, k_high, v_low, lse, delta, is_seen, scale,
    HIGH: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Queries by keys: gradients of scores before the scale, as narrow as g; zero where nothing is seen."""
    s = block_attention_products(q_low, q_high, k_low, k_high, HIGH) * scale - lse[:, None]
    if IS_MASKED:
        s = tl.where(is_seen, s, float("-inf"))
    p = tl.exp2(s)
    pull = tl.dot(g, tl.trans(v_low), input_precision="tf32x3")
    return (p * (pull - delta[:, None])).to(g.dtype)


@triton.jit(do_not_specialize=["slab_first", "slab_last"])
def block_attention_near_query(
    q, k, v, grad, lse, delta, own, places_of, selected, partial, grad_q,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    tokens, slab_first, slab_last, slab_size, heads, groups, selectors, places, scale, plain_scale,
    SHARED: tl.constexpr, OWN_SHARED: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, HAS_PLACES: tl.constexpr,
):  # fmt: skip
    """Gradients of consecutive queries: from their own blocks, and the parts of those they chose."""
    first = slab_first + tl.program_id(0) * (ROWS // PADDED)
    last = tl.minimum(first + ROWS // PADDED, slab_last)
    row, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    token, head, is_in = block_attention_side(first, last, group, OWN_SHARED, PADDED, ROWS)
    batch = row.to(tl.int64)
    line = (batch * tokens + token) * heads + head
    source = q + batch * q_row + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    q_low, q_high = block_attention_load(source, is_in, KEY_DIM, LOW, HIGH)
    g = block_attention_line(grad + line * VALUE_DIM, is_in, VALUE_DIM, VALUES)
    level = tl.load(lse + line, mask=is_in, other=0.0)
    pull = tl.load(delta + line, mask=is_in, other=0.0)
    opened = tl.load(own + batch * tokens + token, mask=is_in, other=2147483647)
    stands, stop = token, last
    if HAS_PLACES:
        stands = tl.load(places_of + batch * tokens + token, mask=is_in, other=-1)
        stop = tl.load(places_of + batch * tokens + last - 1) + 1
    k += batch * k_row + group.to(tl.int64) * k_head
    v += batch * v_row + group.to(tl.int64) * v_head
    key = tl.arange(0, KEYS)
    low = tl.zeros([ROWS, LOW], tl.float32)
    high = tl.zeros([ROWS, HIGH if HIGH else 1], tl.float32)
    for at in range(tl.load(own + batch * tokens + first), stop, KEYS):
        at_key = at + key
        k_low, k_high = block_attention_load(
            k + at_key.to(tl.int64) * k_token, at_key < stop, KEY_DIM, LOW, HIGH
        )
        v_low = block_attention_line(v + at_key.to(tl.int64) * v_token, at_key < stop, VALUE_DIM, VALUES)
        is_seen = (at_key[None, :] <= stands[:, None]) & (at_key[None, :] >= opened[:, None])
        by = block_attention_push(
            q_low, q_high, g, k_low, k_high, v_low, level, pull, is_seen, scale, HIGH, True
        )
        low = tl.dot(by, k_low, low, input_precision="tf32x3")
        if HIGH:
            high = tl.dot(by, k_high, high, input_precision="tf32x3")
    selector = head // SHARED
    choice = ((batch * tokens + token) * selectors + selector) * places
    start = ((batch * slab_size + token - slab_first) * selectors + selector) * places
    for place in range(places):
        is_far = is_in & (tl.load(selected + choice + place, mask=is_in, other=-1) >= 0)
        far = (start + place) * SHARED + head % SHARED
        more, higher = block_attention_load(partial + far * KEY_DIM, is_far, KEY_DIM, LOW, HIGH)
        low += more.to(tl.float32)
        if HIGH:
            high += higher.to(tl.float32)
    low, high = low * plain_scale, high * plain_scale
    block_attention_store(grad_q + line * KEY_DIM, low, high, is_in, KEY_DIM, LOW, HIGH)
