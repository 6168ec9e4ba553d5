"""Attention over chosen keys in Triton: a program takes heads of one query and gathers the query's keys.

FlashAttention-2 (arXiv 2307.08691), algorithm 1 lines 8 to 13 forward, algorithm 2 lines 4 and 10 to 16
backward, in the names of `kernels.attention`: s, p, m_i, m_new, l_i, alpha, acc, lse_i; do, delta, dp, ds,
dq, dk, dv. As a query has its own keys, dk and dv are added to memory that other queries add to: atomically,
or kept by slot of the selection and then summed in a fixed order.

Letters: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, k chosen keys. A slot
is an index into the k chosen keys of a query. A key of K channels is loaded as tiles of K0 channels, the
largest power of two in K, and of K1 for the rest (k0, k1; 0 for none). With IS_SHARED tile k0 is the value
too, so that it is loaded once and has one gradient. x_row, x_token, x_head: strides of x.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require

MAX_KEY_DIM = 1023
MAX_VALUE_DIM = 512
LOG2E = tl.constexpr(1.4426950408889634)
# Bytes of dk and dv by slot that the deterministic backward keeps before it sums them.
KEPT = 2**30


class Tiles(NamedTuple):
    """Heads and keys of a tile, warps and stages."""

    heads: int
    keys: int
    warps: int
    stages: int


class Parts(NamedTuple):
    """Columns of the tiles of a key and of a value; k1 is 0 if k0 is the whole key."""

    k0: int
    k1: int
    v0: int


def parts_of(key_dim: int, value_dim: int) -> Parts:
    """The largest power of two in K, the rest, and V, each padded to a power of two of at least 16."""
    k0 = max(16, 1 << (key_dim.bit_length() - 1))
    rest = key_dim - k0
    k1 = 0 if rest <= 0 else max(16, triton.next_power_of_2(rest))
    return Parts(k0, k1, max(16, triton.next_power_of_2(value_dim)))


def tiles_for(heads: int) -> Tiles:
    """Tiles for so many query heads of a key head."""
    return Tiles(min(64, max(16, triton.next_power_of_2(heads))), 64, 8, 2)


@triton.jit
def selected_count(selection, query, chosen, CHOSEN: tl.constexpr):
    """Number of slots up to the last one that holds a key."""
    slot = tl.arange(0, CHOSEN)
    key = tl.load(selection + query * chosen + slot, mask=slot < chosen, other=-1)
    return tl.max(tl.where(key >= 0, slot + 1, 0), axis=0)


@triton.jit
def selected_rows(x, base, key, is_key, first, dim, stride, DIM: tl.constexpr):
    """Columns from `first` on of the given keys, [keys DIM]; zero where there is no key."""
    column = first + tl.arange(0, DIM)
    offs = base + key[:, None] * stride + column[None, :]
    return tl.load(x + offs, mask=is_key[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def selected_heads(x, base, head, heads, first, dim, stride, DIM: tl.constexpr):
    """Columns from `first` on of some heads of a query, [heads DIM]."""
    column = first + tl.arange(0, DIM)
    offs = base + head[:, None] * stride + column[None, :]
    return tl.load(x + offs, mask=(head < heads)[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def selected_forward(
    q, k, v, selection, sinks, out, lse, tokens, groups, repeat, key_dim, value_dim, chosen, scale,
    strides,
    HAS_SINKS: tl.constexpr, IS_SHARED: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exp of some heads of one query, by an online softmax in base 2."""
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    query = tl.program_id(0).to(tl.int64)
    batch, token = query // tokens, query % tokens
    blocks = tl.cdiv(repeat, HEADS)
    group = tl.program_id(1) // blocks
    head = tl.program_id(1) % blocks * HEADS + tl.arange(0, HEADS)
    q_base = batch * q_row + token * q_token + group * repeat * q_head
    q0 = selected_heads(q, q_base, head, repeat, 0, key_dim, q_head, K0)
    if K1:
        q1 = selected_heads(q, q_base, head, repeat, K0, key_dim, q_head, K1)
    k_base = batch * k_row + group * k_head
    m_i = tl.full([HEADS], -1e30, tl.float32)
    l_i = tl.zeros([HEADS], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + group * repeat + head, mask=head < repeat, other=0.0).to(tl.float32)
        m_i = tl.maximum(sink * LOG2E, m_i)
        l_i = tl.exp2(sink * LOG2E - m_i)
    acc = tl.zeros([HEADS, V0], tl.float32)
    num_slots = selected_count(selection, query, chosen, CHOSEN)
    for start in range(0, num_slots, KEYS):
        slot = start + tl.arange(0, KEYS)
        key = tl.load(selection + query * chosen + slot, mask=slot < chosen, other=-1).to(tl.int32)
        is_key = key >= 0
        k0 = selected_rows(k, k_base, key, is_key, 0, key_dim, k_token, K0)
        s = tl.dot(q0, k0.T, input_precision="tf32x3")
        if K1:
            k1 = selected_rows(k, k_base, key, is_key, K0, key_dim, k_token, K1)
            s = tl.dot(q1, k1.T, s, input_precision="tf32x3")
        s = tl.where(is_key[None, :], s * (scale * LOG2E), float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        if IS_SHARED:
            v_tile = k0
        else:
            v_tile = selected_rows(v, batch * v_row + group * v_head, key, is_key, 0, value_dim, v_token, V0)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="tf32x3")
        m_i = m_new
    is_seen = l_i > 0
    l_i = tl.where(is_seen, l_i, 1.0)
    acc = acc / l_i[:, None]
    column = tl.arange(0, V0)
    row_index = (query * groups + group) * repeat + head
    is_in = (head < repeat)[:, None] & (column < value_dim)[None, :]
    out_ptrs = out + row_index[:, None] * value_dim + column[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=is_in)
    lse_i = tl.where(is_seen, (m_i + tl.log2(l_i)) / LOG2E, float("-inf"))
    tl.store(lse + row_index, lse_i, mask=head < repeat)


@triton.jit
def selected_shares(
    q, k, selection, lse, shares, tokens, groups, repeat, key_dim, first, chosen, kept, scale,
    q_row, q_token, q_head, k_row, k_token, k_head,
    K0: tl.constexpr, K1: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """p of some keys of one query, summed over heads; for the `kept` slots from `first` on."""
    query = tl.program_id(0).to(tl.int64)
    batch, token = query // tokens, query % tokens
    slot = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    is_kept = slot < kept
    key = tl.load(selection + query * chosen + first + slot, mask=is_kept, other=-1).to(tl.int32)
    is_key = key >= 0
    share = tl.zeros([KEYS], tl.float32)
    if tl.max(key, axis=0) >= 0:
        for group in range(groups):
            k_base = batch * k_row + group * k_head
            k0 = selected_rows(k, k_base, key, is_key, 0, key_dim, k_token, K0)
            if K1:
                k1 = selected_rows(k, k_base, key, is_key, K0, key_dim, k_token, K1)
            for start in range(0, repeat, HEADS):
                head = start + tl.arange(0, HEADS)
                q_base = batch * q_row + token * q_token + group * repeat * q_head
                q0 = selected_heads(q, q_base, head, repeat, 0, key_dim, q_head, K0)
                s = tl.dot(q0, k0.T, input_precision="tf32x3")
                if K1:
                    q1 = selected_heads(q, q_base, head, repeat, K0, key_dim, q_head, K1)
                    s = tl.dot(q1, k1.T, s, input_precision="tf32x3")
                row_index = (query * groups + group) * repeat + head
                lse_i = tl.load(lse + row_index, mask=head < repeat, other=0.0)
                is_in = (head < repeat)[:, None] & is_key[None, :]
                s = tl.where(is_in, (s * scale - lse_i[:, None]) * LOG2E, float("-inf"))
                share += tl.sum(tl.exp2(s), axis=0)
    tl.store(shares + query * kept + slot, share, mask=is_kept)


@triton.jit
def selected_backward_q(
    q, k, v, selection, lse, delta, do, dq, tokens, groups, repeat, key_dim, value_dim, chosen, scale,
    strides,
    IS_SHARED: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Gradients of some heads of one query: dq = sum of ds k over its keys."""
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    query = tl.program_id(0).to(tl.int64)
    batch, token = query // tokens, query % tokens
    blocks = tl.cdiv(repeat, HEADS)
    group = tl.program_id(1) // blocks
    head = tl.program_id(1) % blocks * HEADS + tl.arange(0, HEADS)
    q_base = batch * q_row + token * q_token + group * repeat * q_head
    q0 = selected_heads(q, q_base, head, repeat, 0, key_dim, q_head, K0)
    dq0 = tl.zeros([HEADS, K0], tl.float32)
    if K1:
        q1 = selected_heads(q, q_base, head, repeat, K0, key_dim, q_head, K1)
        dq1 = tl.zeros([HEADS, K1], tl.float32)
    row_index = (query * groups + group) * repeat
    do_tile = selected_heads(do, row_index * value_dim, head, repeat, 0, value_dim, value_dim, V0)
    lse_i = tl.load(lse + row_index + head, mask=head < repeat, other=0.0) * LOG2E
    delta_i = tl.load(delta + row_index + head, mask=head < repeat, other=0.0)
    k_base = batch * k_row + group * k_head
    num_slots = selected_count(selection, query, chosen, CHOSEN)
    for start in range(0, num_slots, KEYS):
        slot = start + tl.arange(0, KEYS)
        key = tl.load(selection + query * chosen + slot, mask=slot < chosen, other=-1).to(tl.int32)
        is_key = key >= 0
        k0 = selected_rows(k, k_base, key, is_key, 0, key_dim, k_token, K0)
        s = tl.dot(q0, k0.T, input_precision="tf32x3")
        if K1:
            k1 = selected_rows(k, k_base, key, is_key, K0, key_dim, k_token, K1)
            s = tl.dot(q1, k1.T, s, input_precision="tf32x3")
        s = tl.where(is_key[None, :], s * (scale * LOG2E) - lse_i[:, None], float("-inf"))
        p = tl.exp2(s)
        if IS_SHARED:
            v_tile = k0
        else:
            v_tile = selected_rows(v, batch * v_row + group * v_head, key, is_key, 0, value_dim, v_token, V0)
        dp = tl.dot(do_tile, v_tile.T, input_precision="tf32x3")
        ds = (p * (dp - delta_i[:, None]) * scale).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="tf32x3")
        if K1:
            dq1 = tl.dot(ds, k1, dq1, input_precision="tf32x3")
    dtype = dq.dtype.element_ty
    column = tl.arange(0, K0)
    dq_ptrs = dq + (row_index + head)[:, None] * key_dim + column[None, :]
    tl.store(dq_ptrs, dq0.to(dtype), mask=(head < repeat)[:, None] & (column < key_dim)[None, :])
    if K1:
        column = K0 + tl.arange(0, K1)
        dq_ptrs = dq + (row_index + head)[:, None] * key_dim + column[None, :]
        tl.store(dq_ptrs, dq1.to(dtype), mask=(head < repeat)[:, None] & (column < key_dim)[None, :])


@triton.jit
def selected_put(
    grad, base, key, slot, is_key, first, dim, stride, update, accumulates,
    KEEPS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Adds gradients of the given keys: atomically to those of all keys, with KEEPS to those kept by slot.

    accumulates: whether these slots were written before.
    """
    column = first + tl.arange(0, DIM)
    is_in = is_key[:, None] & (column < dim)[None, :]
    if KEEPS:
        ptrs = grad + base + slot[:, None] * dim + column[None, :]
        tl.store(ptrs, update + tl.load(ptrs, mask=is_in & accumulates, other=0.0), mask=is_in)
    else:
        ptrs = grad + base + key[:, None] * stride + column[None, :]
        tl.atomic_add(ptrs, update, mask=is_in, sem="relaxed")


@triton.jit
def selected_backward_k(
    q, k, v, selection, lse, delta, do, dk, dv, begin, tokens, keys, groups, repeat,
    key_dim, value_dim, shared_dim, chosen, scale,
    strides,
    IS_SHARED: tl.constexpr, KEEPS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys of one query, summed over its heads: dv = p^T do, dk = ds^T q.

    Scores and gradients are computed DIM columns of a key at a time, so that neither the key nor its gradient
    has to fit in registers. With KEEPS the gradients go, by slot, to a buffer of the queries from `begin` on.
    """
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head = strides
    query = begin + tl.program_id(0).to(tl.int64)
    batch, token = query // tokens, query % tokens
    group = tl.program_id(2)
    slot = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = tl.load(selection + query * chosen + slot, mask=slot < chosen, other=-1).to(tl.int32)
    is_key = key >= 0
    if tl.max(key, axis=0) < 0:
        return
    k_base = batch * k_row + group * k_head
    row_index = (query * groups + group) * repeat
    do_base = row_index * value_dim
    q_base = batch * q_row + token * q_token + group * repeat * q_head
    dk_base = (batch * keys * groups + group) * key_dim
    dv_base = (batch * keys * groups + group) * value_dim
    if KEEPS:
        kept = (tl.program_id(0).to(tl.int64) * groups + group) * chosen
        dk_base, dv_base = kept * key_dim, kept * value_dim
    for start in range(0, repeat, HEADS):
        head = start + tl.arange(0, HEADS)
        s = tl.zeros([KEYS, HEADS], tl.float32)
        dp = tl.zeros([KEYS, HEADS], tl.float32)
        for col in range(0, shared_dim, DIM):
            k_part = selected_rows(k, k_base, key, is_key, col, key_dim, k_token, DIM)
            q_part = selected_heads(q, q_base, head, repeat, col, key_dim, q_head, DIM)
            s = tl.dot(k_part, q_part.T, s, input_precision="tf32x3")
            # Past the columns of a value do is loaded as zero.
            do_part = selected_heads(do, do_base, head, repeat, col, value_dim, value_dim, DIM)
            dp = tl.dot(k_part, do_part.T, dp, input_precision="tf32x3")
        for col in range(shared_dim, key_dim, DIM):
            k_part = selected_rows(k, k_base, key, is_key, col, key_dim, k_token, DIM)
            q_part = selected_heads(q, q_base, head, repeat, col, key_dim, q_head, DIM)
            s = tl.dot(k_part, q_part.T, s, input_precision="tf32x3")
        if not IS_SHARED:
            for col in range(0, value_dim, DIM):
                v_part = selected_rows(
                    v, batch * v_row + group * v_head, key, is_key, col, value_dim, v_token, DIM
                )
                do_part = selected_heads(do, do_base, head, repeat, col, value_dim, value_dim, DIM)
                dp = tl.dot(v_part, do_part.T, dp, input_precision="tf32x3")
        lse_i = tl.load(lse + row_index + head, mask=head < repeat, other=0.0) * LOG2E
        delta_i = tl.load(delta + row_index + head, mask=head < repeat, other=0.0)
        is_in = is_key[:, None] & (head < repeat)[None, :]
        s = tl.where(is_in, s * (scale * LOG2E) - lse_i[None, :], float("-inf"))
        p = tl.exp2(s)
        ds = (p * (dp - delta_i[None, :]) * scale).to(q.dtype.element_ty)
        p = p.to(q.dtype.element_ty)
        stride = groups * key_dim
        for col in range(0, shared_dim, DIM):
            q_part = selected_heads(q, q_base, head, repeat, col, key_dim, q_head, DIM)
            do_part = selected_heads(do, do_base, head, repeat, col, value_dim, value_dim, DIM)
            update = tl.dot(ds, q_part, input_precision="tf32x3")
            update = tl.dot(p, do_part, update, input_precision="tf32x3")
            selected_put(dk, dk_base, key, slot, is_key, col, key_dim, stride, update, start > 0, KEEPS, DIM)
        for col in range(shared_dim, key_dim, DIM):
            q_part = selected_heads(q, q_base, head, repeat, col, key_dim, q_head, DIM)
            update = tl.dot(ds, q_part, input_precision="tf32x3")
            selected_put(dk, dk_base, key, slot, is_key, col, key_dim, stride, update, start > 0, KEEPS, DIM)
        if not IS_SHARED:
            stride = groups * value_dim
            for col in range(0, value_dim, DIM):
                do_part = selected_heads(do, do_base, head, repeat, col, value_dim, value_dim, DIM)
                update = tl.dot(p, do_part, input_precision="tf32x3")
                selected_put(
                    dv, dv_base, key, slot, is_key, col, value_dim, stride, update, start > 0, KEEPS, DIM
                )


@triton.jit
def selected_sum(kept, order, ends, grad, keys, groups, chosen, dim, row, DIM: tl.constexpr):
    """Adds the kept gradients of one key of a row, in order of queries."""
    key, group = tl.program_id(0), tl.program_id(1)
    start = tl.load(ends + key)
    stop = tl.load(ends + key + 1)
    column = tl.arange(0, DIM)
    ptrs = grad + (((tl.zeros([], tl.int64) + row) * keys + key) * groups + group) * dim + column
    acc = tl.load(ptrs, mask=column < dim, other=0.0)
    for index in range(start, stop):
        pair = tl.load(order + index)
        row_index = (pair // chosen * groups + group) * chosen + pair % chosen
        acc += tl.load(kept + row_index * dim + column, mask=column < dim, other=0.0)
    tl.store(ptrs, acc, mask=column < dim)


class SelectionOptions(NamedTuple):
    """What does not need a gradient; value_dim is set where values are the first part of the keys."""

    scale: float
    value_dim: int | None
    is_deterministic: bool
    tiles: Tiles


class SelectedAttentionTriton(torch.autograd.Function):
    """q [B T H K], k [B S G K], v [B S G V] or None, sinks [H] or None -> out [B T H V], lse [B T H]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        sinks: Tensor | None,
        selection: Tensor,
        form: SelectionOptions,
    ) -> tuple[Tensor, Tensor]:
        """One launch."""
        rows, tokens, heads, _ = q.shape
        value_dim = form.value_dim or cast(Tensor, v).shape[3]
        out = torch.empty(rows, tokens, heads, value_dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(rows, tokens, heads, dtype=torch.float32, device=q.device)
        sizes, strides, flags, grid = _plan(q, k, v, selection, form)
        selected_forward[grid](
            q, k, v, selection, sinks, out, lse, *sizes, form.scale, strides,
            HAS_SINKS=sinks is not None, CHOSEN=triton.next_power_of_2(selection.shape[2]), **flags,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, sinks, selection, out, lse)
        ctx.form = form
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Two launches; with sums in a fixed order one, and two or three for each chunk of queries."""
        q, k, v, sinks, selection, out, lse = ctx.saved_tensors
        form = ctx.form
        do = grads[0].contiguous()
        delta = (do.float() * out.float()).sum(-1)
        dsinks = None
        if sinks is not None:
            p_sink = torch.exp(sinks.float() - lse.masked_fill(lse == float("-inf"), float("inf")))
            dsinks = -(p_sink * delta).sum((0, 1)).to(sinks.dtype)
        sizes, strides, flags, grid = _plan(q, k, v, selection, form)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Queries and output gradients stay in shared memory, their gradient in registers: fewer keys fit.
        flags |= {"KEYS": max(16, flags["KEYS"] // 2), "num_stages": 1}
        selected_backward_q[grid](
            q, k, v, selection, lse, delta, do, dq, *sizes, form.scale, strides,
            CHOSEN=triton.next_power_of_2(selection.shape[2]), **flags,
        )  # fmt: skip
        dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        dv = None if v is None else torch.zeros(v.shape, dtype=torch.float32, device=k.device)
        inputs = (q, k, v, selection, lse, delta, do)
        if form.is_deterministic:
            _backward_in_order(inputs, dk, dv, form)
        else:
            _backward_keys(inputs, dk, dv, form, 0, grid[0], keeps=False)
        dv = None if v is None else cast(Tensor, dv).to(v.dtype)
        return dq, dk.to(k.dtype), dv, dsinks, None, None


def _plan(
    q: Tensor, k: Tensor, v: Tensor | None, selection: Tensor, form: SelectionOptions
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], tuple[int, int]]:
    rows, tokens, heads, key_dim = q.shape
    groups, value_dim = k.shape[2], form.value_dim or cast(Tensor, v).shape[3]
    parts, tiles = parts_of(key_dim, value_dim), form.tiles
    sizes = (tokens, groups, heads // groups, key_dim, value_dim, selection.shape[2])
    strides = (*q.stride()[:3], *k.stride()[:3], *(k if v is None else v).stride()[:3])
    flags = {
        "IS_SHARED": v is None,
        "K0": parts.k0,
        "K1": parts.k1,
        "V0": parts.v0,
        "HEADS": tiles.heads,
        "KEYS": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return sizes, strides, flags, (rows * tokens, groups * triton.cdiv(heads // groups, tiles.heads))


def _backward_keys(
    inputs: tuple[Tensor, ...],
    dk: Tensor,
    dv: Tensor | None,
    form: SelectionOptions,
    begin: int,
    count: int,
    *,
    keeps: bool,
) -> None:
    q, k, v, selection = inputs[:4]
    sizes, strides, _, _ = _plan(q, k, v, selection, form)
    tokens, groups, repeat, key_dim, value_dim, chosen = sizes
    tiles = form.tiles
    dim = min(64, max(16, triton.next_power_of_2(value_dim)))
    # Where values are the first part of the keys, as many whole steps as reach over them.
    shared = triton.cdiv(value_dim, dim) * dim if v is None else 0
    selected_backward_k[(count, triton.cdiv(chosen, tiles.keys), groups)](
        *inputs, dk, dv, begin, tokens, k.shape[1], groups, repeat, key_dim, value_dim,
        min(shared, key_dim), chosen, form.scale, strides, IS_SHARED=v is None, KEEPS=keeps,
        HEADS=min(2 * tiles.heads, max(16, triton.next_power_of_2(repeat))), KEYS=tiles.keys, DIM=dim,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _backward_in_order(
    inputs: tuple[Tensor, ...], dk: Tensor, dv: Tensor | None, form: SelectionOptions
) -> None:
    """dk and dv kept by query and slot for a chunk of queries, then summed key by key in a fixed order."""
    selection = inputs[3]
    rows, tokens, chosen = selection.shape
    groups = dk.shape[2]
    parts = [dk] if dv is None else [dk, dv]
    per_query = 4 * chosen * groups * sum(part.shape[3] for part in parts)
    step = min(tokens, max(1, KEPT // per_query))
    for row in range(rows):
        for begin in range(0, tokens, step):
            count = min(step, tokens - begin)
            kept = [
                torch.empty(count, groups, chosen, part.shape[3], dtype=torch.float32, device=part.device)
                for part in parts
            ]
            _backward_keys(
                inputs, kept[0], None if dv is None else kept[1], form, row * tokens + begin, count,
                keeps=True,
            )  # fmt: skip
            sum_in_order(kept, selection[row, begin : begin + count], parts, row)


def sum_in_order(
    kept: list[Float[Tensor, "Q G k D"]],
    selection: Int[Tensor, "Q k"],
    into: list[Float[Tensor, "B S G D"]],
    row: int,
) -> None:
    """Adds gradients that are kept by query and slot to those of the keys of one row of `into`.

    Key by key, in order of queries, so that two runs agree bitwise. Mutates `into`.
    """
    keys, groups = into[0].shape[1:3]
    keys_in_order = torch.arange(keys + 1, device=selection.device, dtype=selection.dtype)
    # -1 sorts before every key, and is summed by none.
    named, order = selection.flatten().sort(stable=True)
    ends = torch.searchsorted(named, keys_in_order)
    for part, target in zip(kept, into, strict=True):
        dim = part.shape[3]
        selected_sum[(keys, groups)](
            part, order, ends, target, keys, groups, selection.shape[1], dim, row,
            DIM=triton.next_power_of_2(dim),
        )  # fmt: skip


def selected_attention_triton(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"] | int,
    selection: Int[Tensor, "B T k"],
    *,
    scale: float,
    sinks: Float[Tensor, "H"] | None = None,
    is_deterministic: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """`kernels.selected_attention.selected_attention`, and the log-sum-exp without a gradient.

    Gradients of keys are added atomically, in any order; is_deterministic fixes the order, at a few times the
    memory traffic.

    Raises ValueError for dims beyond MAX_KEY_DIM and MAX_VALUE_DIM, or inputs on several devices.
    """
    key_dim = k.shape[3]
    value_dim = v if isinstance(v, int) else v.shape[3]
    require(key_dim <= MAX_KEY_DIM, "k", f"at most {MAX_KEY_DIM} dims", key_dim)
    require(value_dim <= MAX_VALUE_DIM, "v", f"at most {MAX_VALUE_DIM} dims", value_dim)
    for name, x in (("k", k), ("v", v), ("selection", selection), ("sinks", sinks)):
        is_there = not isinstance(x, Tensor) or x.device == q.device
        require(is_there, name, f"on {q.device}, as q", None if is_there else cast(Tensor, x).device)
    # The kernels take offsets within a row in 32 bits.
    require(k.stride(1) * k.shape[1] < 2**31, "k", "rows of fewer than 2^31 numbers", tuple(k.shape))
    shared = isinstance(v, int) and v == parts_of(key_dim, value_dim).k0
    values = None if shared else (k[..., :v] if isinstance(v, int) else v)
    if selection.shape[2] == 0:
        selection = selection.new_full((*selection.shape[:2], 1), -1)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    values = values if values is None or values.stride(3) == 1 else values.contiguous()
    tiles = tiles or tiles_for(q.shape[2] // k.shape[2])
    form = SelectionOptions(scale, value_dim if shared else None, is_deterministic, tiles)
    sinks = None if sinks is None else sinks.contiguous()
    out = SelectedAttentionTriton.apply(q, k, values, sinks, selection.contiguous(), form)
    return cast(tuple[Tensor, Tensor], out)


@torch.no_grad()
def shares_triton(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    selection: Int[Tensor, "B T k"],
    lse: Float[Tensor, "B T H"],
    *,
    scale: float,
    first: int = 0,
    tiles: Tiles | None = None,
) -> Float[Tensor, "B T s"]:
    """p of each chosen key, summed over heads; of the s = k - first slots from `first` on."""
    rows, tokens, heads, key_dim = q.shape
    groups, kept = k.shape[2], selection.shape[2] - first
    shares = torch.empty(rows, tokens, kept, dtype=torch.float32, device=q.device)
    if kept == 0:
        return shares
    tiles, parts = tiles or tiles_for(heads // groups), parts_of(key_dim, 1)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    selected_shares[(rows * tokens, triton.cdiv(kept, tiles.keys))](
        q, k, selection.contiguous(), lse, shares, tokens, groups, heads // groups, key_dim, first,
        selection.shape[2], kept, scale, *q.stride()[:3], *k.stride()[:3], K0=parts.k0, K1=parts.k1,
        HEADS=tiles.heads, KEYS=tiles.keys, num_warps=tiles.warps, num_stages=1,
    )  # fmt: skip
    return shares
