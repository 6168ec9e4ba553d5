"""Attention over selected blocks as Triton kernels: a block with all queries that chose it, then their sums.

Log-sum-exps are of base 2. Letters: B rows, T tokens, H query heads, G key heads, J selecting heads, R query
heads of a selection, n places, K and V dims in two parts and one.
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
)


@triton.jit(do_not_specialize=["slab_first", "slab"])
def block_attention_far(
    q, k, v, starts, order, bounds, owner, before, partial, partial_lse,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    tokens, slab_first, slab_size, slab, slabs, lists, slots, groups, selectors, places, scale,
    SHARED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The choices of one block: each one's normalised output over that block, and its log-sum-exp."""
    ITEMS: tl.constexpr = ROWS // PADDED
    found, begin, end = block_attention_part(owner, before, bounds, lists, 1, slab, slabs, ITEMS * STEPS)
    if found >= lists:
        return
    row, group, slot = found // (slots * groups), (found // slots) % groups, found % slots
    start = tl.load(starts + row * slots + slot).to(tl.int64)
    q += row.to(tl.int64) * q_row
    k += row.to(tl.int64) * k_row + start * k_token + group.to(tl.int64) * k_head
    v += row.to(tl.int64) * v_row + start * v_token + group.to(tl.int64) * v_head
    key, column = tl.arange(0, KEYS), tl.arange(0, VALUES)
    if BLOCK <= KEYS:
        # One tile of keys stays for all of the choices.
        is_key = key < BLOCK
        k_low, k_high = block_attention_load(k + key * k_token, is_key, KEY_DIM, LOW, HIGH)
        v_low = block_attention_line(v + key * v_token, is_key, VALUE_DIM, VALUES)
        for at in range(begin, end, ITEMS):
            token, selector, head, place, is_in = block_attention_rows(
                order, at, end, tokens, selectors, places, SHARED, PADDED, ROWS
            )
            source = q + token.to(tl.int64) * q_token + (selector * SHARED + head).to(tl.int64) * q_head
            q_low, q_high = block_attention_load(source, is_in, KEY_DIM, LOW, HIGH)
            s = block_attention_products(q_low, q_high, k_low, k_high, HIGH) * scale
            if BLOCK < KEYS:
                s = tl.where(is_key[None, :], s, float("-inf"))
            peak = tl.max(s, axis=1)
            p = tl.exp2(s - peak[:, None])
            length = tl.sum(p, axis=1)
            out = tl.dot(p.to(v_low.dtype), v_low, input_precision="tf32x3") / length[:, None]
            line = (row.to(tl.int64) * slab_size + token - slab_first) * selectors + selector
            line = (line * places + place) * SHARED + head
            is_out = is_in[:, None] & (column < VALUE_DIM)[None, :]
            tl.store(
                partial + line[:, None] * VALUE_DIM + column[None, :],
                out.to(partial.dtype.element_ty),
                mask=is_out,
            )
            tl.store(partial_lse + line, peak + tl.log2(length), mask=is_in)
    else:
        tl.static_assert(STEPS == 1, "one tile of choices for each program")
        token, selector, head, place, is_in = block_attention_rows(
            order, begin, end, tokens, selectors, places, SHARED, PADDED, ROWS
        )
        source = q + token.to(tl.int64) * q_token + (selector * SHARED + head).to(tl.int64) * q_head
        q_low, q_high = block_attention_load(source, is_in, KEY_DIM, LOW, HIGH)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        length = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, VALUES], tl.float32)
        for first in range(0, BLOCK, KEYS):
            is_key = first + key < BLOCK
            at_key = first + key
            k_low, k_high = block_attention_load(k + at_key * k_token, is_key, KEY_DIM, LOW, HIGH)
            v_low = block_attention_line(v + at_key * v_token, is_key, VALUE_DIM, VALUES)
            s = block_attention_products(q_low, q_high, k_low, k_high, HIGH) * scale
            if BLOCK % KEYS:
                s = tl.where(is_key[None, :], s, float("-inf"))
            top = tl.maximum(peak, tl.max(s, axis=1))
            p = tl.exp2(s - top[:, None])
            fade = tl.exp2(peak - top)
            length = length * fade + tl.sum(p, axis=1)
            total = tl.dot(p.to(v_low.dtype), v_low, total * fade[:, None], input_precision="tf32x3")
            peak = top
        line = (row.to(tl.int64) * slab_size + token - slab_first) * selectors + selector
        line = (line * places + place) * SHARED + head
        is_out = is_in[:, None] & (column < VALUE_DIM)[None, :]
        out = total / length[:, None]
        tl.store(
            partial + line[:, None] * VALUE_DIM + column[None, :],
            out.to(partial.dtype.element_ty),
            mask=is_out,
        )
        tl.store(partial_lse + line, peak + tl.log2(length), mask=is_in)


@triton.jit(do_not_specialize=["slab_first", "slab_last"])
def block_attention_near(
    q, k, v, own, places_of, selected, partial, partial_lse, out, lse, mass,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    tokens, slab_first, slab_last, slab_size, heads, groups, selectors, places, scale,
    SHARED: tl.constexpr, OWN_SHARED: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, HAS_PLACES: tl.constexpr,
):  # fmt: skip
    """Consecutive queries over their own blocks, then over the partial outputs of those they chose.

    places_of: where each query stands among the keys; without, query t is key t.
    """
    first = slab_first + tl.program_id(0) * (ROWS // PADDED)
    last = tl.minimum(first + ROWS // PADDED, slab_last)
    row, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    token, head, is_in = block_attention_side(first, last, group, OWN_SHARED, PADDED, ROWS)
    batch = row.to(tl.int64)
    source = q + batch * q_row + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    q_low, q_high = block_attention_load(source, is_in, KEY_DIM, LOW, HIGH)
    k += batch * k_row + group.to(tl.int64) * k_head
    v += batch * v_row + group.to(tl.int64) * v_head
    opened = tl.load(own + batch * tokens + token, mask=is_in, other=2147483647)
    stands, stop = token, last
    if HAS_PLACES:
        stands = tl.load(places_of + batch * tokens + token, mask=is_in, other=-1)
        stop = tl.load(places_of + batch * tokens + last - 1) + 1
    key, column = tl.arange(0, KEYS), tl.arange(0, VALUES)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    length = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, VALUES], tl.float32)
    # Own blocks of later queries start no earlier.
    for at in range(tl.load(own + batch * tokens + first), stop, KEYS):
        at_key = at + key
        k_low, k_high = block_attention_load(
            k + at_key.to(tl.int64) * k_token, at_key < stop, KEY_DIM, LOW, HIGH
        )
        v_low = block_attention_line(v + at_key.to(tl.int64) * v_token, at_key < stop, VALUE_DIM, VALUES)
        s = block_attention_products(q_low, q_high, k_low, k_high, HIGH) * scale
        is_seen = (at_key[None, :] <= stands[:, None]) & (at_key[None, :] >= opened[:, None])
        s = tl.where(is_seen, s, float("-inf"))
        top = tl.maximum(peak, tl.max(s, axis=1))
        level = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - level[:, None])
        fade = tl.exp2(peak - level)
        length = length * fade + tl.sum(p, axis=1)
        total = tl.dot(p.to(v_low.dtype), v_low, total * fade[:, None], input_precision="tf32x3")
        peak = top
    # Rows that are none go on as if they saw one key.
    peak, length = tl.where(is_in, peak, 0.0), tl.where(is_in, length, 1.0)
    own_lse = peak + tl.log2(length)
    selector = head // SHARED
    choice = ((batch * tokens + token) * selectors + selector) * places
    line = ((batch * slab_size + token - slab_first) * selectors + selector) * places
    top, share = own_lse, tl.full([ROWS], 1.0, tl.float32)
    for place in range(places):
        is_far = is_in & (tl.load(selected + choice + place, mask=is_in, other=-1) >= 0)
        far = (line + place) * SHARED + head % SHARED
        level = tl.load(partial_lse + far, mask=is_far, other=float("-inf"))
        higher = tl.maximum(top, level)
        share = share * tl.exp2(top - higher) + tl.exp2(level - higher)
        top = higher
    full = top + tl.log2(share)
    total *= tl.exp2(peak - full)[:, None]
    token_in = first + tl.arange(0, ROWS // PADDED)
    if OWN_SHARED == SHARED:
        target = mass + ((batch * tokens + token_in) * selectors + group) * (places + 1)
        own_part = tl.where(is_in, tl.exp2(own_lse - full), 0.0)
        tl.store(target, tl.sum(own_part.reshape(ROWS // PADDED, PADDED), axis=1), mask=token_in < last)
    else:
        target = mass + ((batch * tokens + token) * selectors + selector) * (places + 1)
        tl.store(target, tl.exp2(own_lse - full), mask=is_in)
    for place in range(places):
        is_far = is_in & (tl.load(selected + choice + place, mask=is_in, other=-1) >= 0)
        far = (line + place) * SHARED + head % SHARED
        level = tl.load(partial_lse + far, mask=is_far, other=float("-inf"))
        part = tl.exp2(level - full)
        is_out = is_far[:, None] & (column < VALUE_DIM)[None, :]
        values = tl.load(partial + far[:, None] * VALUE_DIM + column[None, :], mask=is_out, other=0.0)
        total += part[:, None] * values.to(tl.float32)
        if OWN_SHARED == SHARED:
            heads_part = tl.sum(part.reshape(ROWS // PADDED, PADDED), axis=1)
            tl.store(target + 1 + place, heads_part, mask=token_in < last)
        else:
            tl.store(target + 1 + place, part, mask=is_in)
    line = (batch * tokens + token) * heads + head
    is_out = is_in[:, None] & (column < VALUE_DIM)[None, :]
    place_of = out + line[:, None] * VALUE_DIM + column[None, :]
    tl.store(place_of, total.to(out.dtype.element_ty), mask=is_out)
    tl.store(lse + line, full, mask=is_in)
