"""Attention over chosen keys in Triton: a program takes the heads of one query, and gathers its keys.

Letters: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, k chosen keys. A key
of K numbers is loaded as a first part A, the largest power of two in K, and the rest, part B. With IS_SHARED
part A is the value too, so that it is loaded once and gets one gradient.
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
# Bytes of the contributions that the deterministic backward keeps before it sums them.
KEPT = 2**30


class Tiles(NamedTuple):
    """Heads and keys of a tile, warps and stages."""

    heads: int
    keys: int
    warps: int
    stages: int


class Parts(NamedTuple):
    """Sizes of the parts of a key and of a value as the kernels load them, 0 for no part B."""

    a: int
    b: int
    v: int


def parts_of(key_dim: int, value_dim: int) -> Parts:
    """The largest power of two in K, the rest, and V, each padded to a power of two of at least 16."""
    a = max(16, 1 << (key_dim.bit_length() - 1))
    rest = key_dim - a
    b = 0 if rest <= 0 else max(16, triton.next_power_of_2(rest))
    return Parts(a, b, max(16, triton.next_power_of_2(value_dim)))


def tiles_for(heads: int) -> Tiles:
    """Tiles for so many query heads of a key head."""
    return Tiles(min(64, max(16, triton.next_power_of_2(heads))), 64, 8, 2)


@triton.jit
def selected_count(selection, line, chosen, CHOSEN: tl.constexpr):
    """How far the selection reaches: the place behind its last key."""
    place = tl.arange(0, CHOSEN)
    key = tl.load(selection + line * chosen + place, mask=place < chosen, other=-1)
    return tl.max(tl.where(key >= 0, place + 1, 0), axis=0)


@triton.jit
def selected_rows(x, base, key, is_key, first, dim, stride, DIM: tl.constexpr):
    """Numbers `first` on of the keys named, [keys DIM]; zero where there is no key."""
    column = first + tl.arange(0, DIM)
    place = base + key[:, None] * stride + column[None, :]
    return tl.load(x + place, mask=is_key[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def selected_heads(x, base, head, heads, first, dim, stride, DIM: tl.constexpr):
    """Numbers `first` on of some heads of a query, [heads DIM]."""
    column = first + tl.arange(0, DIM)
    place = base + head[:, None] * stride + column[None, :]
    return tl.load(x + place, mask=(head < heads)[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def selected_forward(
    q, k, v, selection, sinks, out, lse, tokens, groups, repeat, key_dim, value_dim, chosen, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    HAS_SINKS: tl.constexpr, IS_SHARED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exp of some heads of one query, by an online softmax in base 2."""
    line = tl.program_id(0).to(tl.int64)
    row, token = line // tokens, line % tokens
    blocks = tl.cdiv(repeat, HEADS)
    group = tl.program_id(1) // blocks
    head = tl.program_id(1) % blocks * HEADS + tl.arange(0, HEADS)
    q_base = row * q_row + token * q_token + group * repeat * q_head
    q_a = selected_heads(q, q_base, head, repeat, 0, key_dim, q_head, A)
    if B:
        q_b = selected_heads(q, q_base, head, repeat, A, key_dim, q_head, B)
    k_base = row * k_row + group * k_head
    top = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + group * repeat + head, mask=head < repeat, other=0.0).to(tl.float32)
        top = tl.maximum(sink * LOG2E, top)
        total = tl.exp2(sink * LOG2E - top)
    mixed = tl.zeros([HEADS, V], tl.float32)
    reach = selected_count(selection, line, chosen, CHOSEN)
    for start in range(0, reach, KEYS):
        place = start + tl.arange(0, KEYS)
        key = tl.load(selection + line * chosen + place, mask=place < chosen, other=-1).to(tl.int32)
        is_key = key >= 0
        k_a = selected_rows(k, k_base, key, is_key, 0, key_dim, k_token, A)
        scores = tl.dot(q_a, k_a.T, input_precision="tf32x3")
        if B:
            k_b = selected_rows(k, k_base, key, is_key, A, key_dim, k_token, B)
            scores = tl.dot(q_b, k_b.T, scores, input_precision="tf32x3")
        scores = tl.where(is_key[None, :], scores * (scale * LOG2E), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(top - higher)
        total = total * kept + tl.sum(weights, axis=1)
        if IS_SHARED:
            values = k_a
        else:
            values = selected_rows(v, row * v_row + group * v_head, key, is_key, 0, value_dim, v_token, V)
        mixed = mixed * kept[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="tf32x3")
        top = higher
    is_seen = total > 0
    total = tl.where(is_seen, total, 1.0)
    mixed = mixed / total[:, None]
    column = tl.arange(0, V)
    spot = (line * groups + group) * repeat + head
    is_in = (head < repeat)[:, None] & (column < value_dim)[None, :]
    target = out + spot[:, None] * value_dim + column[None, :]
    tl.store(target, mixed.to(out.dtype.element_ty), mask=is_in)
    size = tl.where(is_seen, (top + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(lse + spot, size, mask=head < repeat)


@triton.jit
def selected_shares(
    q, k, selection, lse, shares, tokens, groups, repeat, key_dim, first, chosen, kept, scale,
    q_row, q_token, q_head, k_row, k_token, k_head,
    A: tl.constexpr, B: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What all heads take of some keys of one query; `kept` of the chosen keys, from place `first` on."""
    line = tl.program_id(0).to(tl.int64)
    row, token = line // tokens, line % tokens
    place = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    is_kept = place < kept
    key = tl.load(selection + line * chosen + first + place, mask=is_kept, other=-1).to(tl.int32)
    is_key = key >= 0
    share = tl.zeros([KEYS], tl.float32)
    if tl.max(key, axis=0) >= 0:
        for group in range(groups):
            k_base = row * k_row + group * k_head
            k_a = selected_rows(k, k_base, key, is_key, 0, key_dim, k_token, A)
            if B:
                k_b = selected_rows(k, k_base, key, is_key, A, key_dim, k_token, B)
            for start in range(0, repeat, HEADS):
                head = start + tl.arange(0, HEADS)
                q_base = row * q_row + token * q_token + group * repeat * q_head
                q_a = selected_heads(q, q_base, head, repeat, 0, key_dim, q_head, A)
                scores = tl.dot(q_a, k_a.T, input_precision="tf32x3")
                if B:
                    q_b = selected_heads(q, q_base, head, repeat, A, key_dim, q_head, B)
                    scores = tl.dot(q_b, k_b.T, scores, input_precision="tf32x3")
                spot = (line * groups + group) * repeat + head
                size = tl.load(lse + spot, mask=head < repeat, other=0.0)
                is_in = (head < repeat)[:, None] & is_key[None, :]
                scores = tl.where(is_in, (scores * scale - size[:, None]) * LOG2E, float("-inf"))
                share += tl.sum(tl.exp2(scores), axis=0)
    tl.store(shares + line * kept + place, share, mask=is_kept)


@triton.jit
def selected_backward_q(
    q, k, v, selection, lse, pull, grad, grad_q, tokens, groups, repeat, key_dim, value_dim, chosen, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    IS_SHARED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Gradients of some heads of one query: the sum over its keys of p (dp - pull) k."""
    line = tl.program_id(0).to(tl.int64)
    row, token = line // tokens, line % tokens
    blocks = tl.cdiv(repeat, HEADS)
    group = tl.program_id(1) // blocks
    head = tl.program_id(1) % blocks * HEADS + tl.arange(0, HEADS)
    q_base = row * q_row + token * q_token + group * repeat * q_head
    q_a = selected_heads(q, q_base, head, repeat, 0, key_dim, q_head, A)
    into_a = tl.zeros([HEADS, A], tl.float32)
    if B:
        q_b = selected_heads(q, q_base, head, repeat, A, key_dim, q_head, B)
        into_b = tl.zeros([HEADS, B], tl.float32)
    first = (line * groups + group) * repeat
    g = selected_heads(grad, first * value_dim, head, repeat, 0, value_dim, value_dim, V)
    size = tl.load(lse + first + head, mask=head < repeat, other=0.0) * LOG2E
    mean = tl.load(pull + first + head, mask=head < repeat, other=0.0)
    k_base = row * k_row + group * k_head
    reach = selected_count(selection, line, chosen, CHOSEN)
    for start in range(0, reach, KEYS):
        place = start + tl.arange(0, KEYS)
        key = tl.load(selection + line * chosen + place, mask=place < chosen, other=-1).to(tl.int32)
        is_key = key >= 0
        k_a = selected_rows(k, k_base, key, is_key, 0, key_dim, k_token, A)
        scores = tl.dot(q_a, k_a.T, input_precision="tf32x3")
        if B:
            k_b = selected_rows(k, k_base, key, is_key, A, key_dim, k_token, B)
            scores = tl.dot(q_b, k_b.T, scores, input_precision="tf32x3")
        scores = tl.where(is_key[None, :], scores * (scale * LOG2E) - size[:, None], float("-inf"))
        weights = tl.exp2(scores)
        if IS_SHARED:
            values = k_a
        else:
            values = selected_rows(v, row * v_row + group * v_head, key, is_key, 0, value_dim, v_token, V)
        along = tl.dot(g, values.T, input_precision="tf32x3")
        along = (weights * (along - mean[:, None]) * scale).to(k_a.dtype)
        into_a = tl.dot(along, k_a, into_a, input_precision="tf32x3")
        if B:
            into_b = tl.dot(along, k_b, into_b, input_precision="tf32x3")
    kind = grad_q.dtype.element_ty
    column = tl.arange(0, A)
    target = grad_q + (first + head)[:, None] * key_dim + column[None, :]
    tl.store(target, into_a.to(kind), mask=(head < repeat)[:, None] & (column < key_dim)[None, :])
    if B:
        column = A + tl.arange(0, B)
        target = grad_q + (first + head)[:, None] * key_dim + column[None, :]
        tl.store(target, into_b.to(kind), mask=(head < repeat)[:, None] & (column < key_dim)[None, :])


@triton.jit
def selected_put(
    grad, base, key, place, is_key, first, dim, stride, into, is_more,
    KEEPS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Adds gradients of keys to those of the keys named; with KEEPS to what is kept by place, if any is."""
    column = first + tl.arange(0, DIM)
    is_in = is_key[:, None] & (column < dim)[None, :]
    if KEEPS:
        target = grad + base + place[:, None] * dim + column[None, :]
        tl.store(target, into + tl.load(target, mask=is_in & is_more, other=0.0), mask=is_in)
    else:
        target = grad + base + key[:, None] * stride + column[None, :]
        tl.atomic_add(target, into, mask=is_in, sem="relaxed")


@triton.jit
def selected_backward_k(
    q, k, v, selection, lse, pull, grad, grad_k, grad_v, begin, tokens, keys, groups, repeat,
    key_dim, value_dim, shared_dim, chosen, scale,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    IS_SHARED: tl.constexpr, KEEPS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys of one query, summed over its heads: p^T dout, and (p (dp - pull))^T q.

    Scores and gradients are made DIM numbers of a key at a time, so that neither the key nor its gradient has
    to fit. With KEEPS the gradients go, by place in the selection, to a buffer of the queries from `begin`.
    """
    line = begin + tl.program_id(0).to(tl.int64)
    row, token = line // tokens, line % tokens
    group = tl.program_id(2)
    place = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = tl.load(selection + line * chosen + place, mask=place < chosen, other=-1).to(tl.int32)
    is_key = key >= 0
    if tl.max(key, axis=0) < 0:
        return
    k_base = row * k_row + group * k_head
    first = (line * groups + group) * repeat
    g_base = first * value_dim
    q_base = row * q_row + token * q_token + group * repeat * q_head
    into_k = (row * keys * groups + group) * key_dim
    into_v = (row * keys * groups + group) * value_dim
    if KEEPS:
        kept = (tl.program_id(0).to(tl.int64) * groups + group) * chosen
        into_k, into_v = kept * key_dim, kept * value_dim
    for start in range(0, repeat, HEADS):
        head = start + tl.arange(0, HEADS)
        scores = tl.zeros([KEYS, HEADS], tl.float32)
        along = tl.zeros([KEYS, HEADS], tl.float32)
        for at in range(0, shared_dim, DIM):
            k_part = selected_rows(k, k_base, key, is_key, at, key_dim, k_token, DIM)
            q_part = selected_heads(q, q_base, head, repeat, at, key_dim, q_head, DIM)
            scores = tl.dot(k_part, q_part.T, scores, input_precision="tf32x3")
            # Beyond the values there is no output gradient: it is loaded as zero.
            g_part = selected_heads(grad, g_base, head, repeat, at, value_dim, value_dim, DIM)
            along = tl.dot(k_part, g_part.T, along, input_precision="tf32x3")
        for at in range(shared_dim, key_dim, DIM):
            k_part = selected_rows(k, k_base, key, is_key, at, key_dim, k_token, DIM)
            q_part = selected_heads(q, q_base, head, repeat, at, key_dim, q_head, DIM)
            scores = tl.dot(k_part, q_part.T, scores, input_precision="tf32x3")
        if not IS_SHARED:
            for at in range(0, value_dim, DIM):
                v_part = selected_rows(
                    v, row * v_row + group * v_head, key, is_key, at, value_dim, v_token, DIM
                )
                g_part = selected_heads(grad, g_base, head, repeat, at, value_dim, value_dim, DIM)
                along = tl.dot(v_part, g_part.T, along, input_precision="tf32x3")
        size = tl.load(lse + first + head, mask=head < repeat, other=0.0) * LOG2E
        mean = tl.load(pull + first + head, mask=head < repeat, other=0.0)
        is_in = is_key[:, None] & (head < repeat)[None, :]
        scores = tl.where(is_in, scores * (scale * LOG2E) - size[None, :], float("-inf"))
        scores = tl.exp2(scores)
        along = (scores * (along - mean[None, :]) * scale).to(q.dtype.element_ty)
        weights = scores.to(q.dtype.element_ty)
        stride = groups * key_dim
        for at in range(0, shared_dim, DIM):
            q_part = selected_heads(q, q_base, head, repeat, at, key_dim, q_head, DIM)
            g_part = selected_heads(grad, g_base, head, repeat, at, value_dim, value_dim, DIM)
            into = tl.dot(along, q_part, input_precision="tf32x3")
            into = tl.dot(weights, g_part, into, input_precision="tf32x3")
            selected_put(grad_k, into_k, key, place, is_key, at, key_dim, stride, into, start > 0, KEEPS, DIM)
        for at in range(shared_dim, key_dim, DIM):
            q_part = selected_heads(q, q_base, head, repeat, at, key_dim, q_head, DIM)
            into = tl.dot(along, q_part, input_precision="tf32x3")
            selected_put(grad_k, into_k, key, place, is_key, at, key_dim, stride, into, start > 0, KEEPS, DIM)
        if not IS_SHARED:
            stride = groups * value_dim
            for at in range(0, value_dim, DIM):
                g_part = selected_heads(grad, g_base, head, repeat, at, value_dim, value_dim, DIM)
                into = tl.dot(weights, g_part, input_precision="tf32x3")
                selected_put(
                    grad_v, into_v, key, place, is_key, at, value_dim, stride, into, start > 0, KEEPS, DIM
                )


@triton.jit
def selected_sum(kept, order, ends, grad, keys, groups, chosen, dim, row, DIM: tl.constexpr):
    """Adds, in order of queries, what the kept contributions hold for one key of a row."""
    key, group = tl.program_id(0), tl.program_id(1)
    start = tl.load(ends + key)
    stop = tl.load(ends + key + 1)
    column = tl.arange(0, DIM)
    target = grad + (((tl.zeros([], tl.int64) + row) * keys + key) * groups + group) * dim + column
    total = tl.load(target, mask=column < dim, other=0.0)
    for spot in range(start, stop):
        pair = tl.load(order + spot)
        line = (pair // chosen * groups + group) * chosen + pair % chosen
        total += tl.load(kept + line * dim + column, mask=column < dim, other=0.0)
    tl.store(target, total, mask=column < dim)


class Form(NamedTuple):
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
        form: Form,
    ) -> tuple[Tensor, Tensor]:
        """One launch."""
        rows, tokens, heads, _ = q.shape
        value_dim = form.value_dim or cast(Tensor, v).shape[3]
        out = torch.empty(rows, tokens, heads, value_dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(rows, tokens, heads, dtype=torch.float32, device=q.device)
        sizes, strides, flags, grid = _plan(q, k, v, selection, form)
        selected_forward[grid](
            q, k, v, selection, sinks, out, lse, *sizes, form.scale, *strides,
            HAS_SINKS=sinks is not None, CHOSEN=triton.next_power_of_2(selection.shape[2]), **flags,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, sinks, selection, out, lse)
        ctx.form = form
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Two launches, or with deterministic sums three for every slab of queries."""
        q, k, v, sinks, selection, out, lse = ctx.saved_tensors
        form = ctx.form
        grad = grads[0].contiguous()
        pull = (grad.float() * out.float()).sum(-1)
        grad_sinks = None
        if sinks is not None:
            share = torch.exp(sinks.float() - lse.masked_fill(lse == float("-inf"), float("inf")))
            grad_sinks = -(share * pull).sum((0, 1)).to(sinks.dtype)
        sizes, strides, flags, grid = _plan(q, k, v, selection, form)
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Queries and output gradients stay in shared memory, their gradient in registers: fewer keys fit.
        flags |= {"KEYS": max(16, flags["KEYS"] // 2), "num_stages": 1}
        selected_backward_q[grid](
            q, k, v, selection, lse, pull, grad, grad_q, *sizes, form.scale, *strides,
            CHOSEN=triton.next_power_of_2(selection.shape[2]), **flags,
        )  # fmt: skip
        grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        grad_v = None if v is None else torch.zeros(v.shape, dtype=torch.float32, device=k.device)
        inputs = (q, k, v, selection, lse, pull, grad)
        if form.is_deterministic:
            _backward_in_order(inputs, grad_k, grad_v, form)
        else:
            _backward_keys(inputs, grad_k, grad_v, form, 0, grid[0], keeps=False)
        grad_v = None if v is None else cast(Tensor, grad_v).to(v.dtype)
        return grad_q, grad_k.to(k.dtype), grad_v, grad_sinks, None, None


def _plan(
    q: Tensor, k: Tensor, v: Tensor | None, selection: Tensor, form: Form
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], tuple[int, int]]:
    rows, tokens, heads, key_dim = q.shape
    groups, value_dim = k.shape[2], form.value_dim or cast(Tensor, v).shape[3]
    parts, tiles = parts_of(key_dim, value_dim), form.tiles
    sizes = (tokens, groups, heads // groups, key_dim, value_dim, selection.shape[2])
    strides = (*q.stride()[:3], *k.stride()[:3], *(k if v is None else v).stride()[:3])
    flags = {
        "IS_SHARED": v is None,
        "A": parts.a,
        "B": parts.b,
        "V": parts.v,
        "HEADS": tiles.heads,
        "KEYS": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return sizes, strides, flags, (rows * tokens, groups * triton.cdiv(heads // groups, tiles.heads))


def _backward_keys(
    inputs: tuple[Tensor, ...],
    grad_k: Tensor,
    grad_v: Tensor | None,
    form: Form,
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
        *inputs, grad_k, grad_v, begin, tokens, k.shape[1], groups, repeat, key_dim, value_dim,
        min(shared, key_dim), chosen, form.scale, *strides, IS_SHARED=v is None, KEEPS=keeps,
        HEADS=min(2 * tiles.heads, max(16, triton.next_power_of_2(repeat))), KEYS=tiles.keys, DIM=dim,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _backward_in_order(inputs: tuple[Tensor, ...], grad_k: Tensor, grad_v: Tensor | None, form: Form) -> None:
    """The gradients of keys kept by query for a slab of queries, then summed key by key in a fixed order."""
    selection = inputs[3]
    rows, tokens, chosen = selection.shape
    groups = grad_k.shape[2]
    parts = [grad_k] if grad_v is None else [grad_k, grad_v]
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
                inputs, kept[0], None if grad_v is None else kept[1], form, row * tokens + begin, count,
                keeps=True,
            )  # fmt: skip
            sum_in_order(kept, selection[row, begin : begin + count], parts, row)


def sum_in_order(
    kept: list[Float[Tensor, "Q G k D"]],
    selection: Int[Tensor, "Q k"],
    into: list[Float[Tensor, "B S G D"]],
    row: int,
) -> None:
    """Adds what is kept of some queries, by place in their selections, to the keys of one row of `into`.

    Key by key, in order of queries: twice the same is bitwise the same. Mutates `into`.
    """
    keys, groups = into[0].shape[1:3]
    places = torch.arange(keys + 1, device=selection.device, dtype=selection.dtype)
    # None sorts before every key, and no key sums it.
    named, order = selection.flatten().sort(stable=True)
    ends = torch.searchsorted(named, places)
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
    """`kernels.selected_attention.selected_attention` and the log-sum-exp, which gets no gradient.

    Gradients of keys are summed by atomic additions, in any order; is_deterministic fixes the order, for a
    few times the memory traffic.

    Raises ValueError for dims beyond MAX_KEY_DIM and MAX_VALUE_DIM, or inputs on several devices.
    """
    key_dim = k.shape[3]
    value_dim = v if isinstance(v, int) else v.shape[3]
    require(key_dim <= MAX_KEY_DIM, "k", f"at most {MAX_KEY_DIM} dims", key_dim)
    require(value_dim <= MAX_VALUE_DIM, "v", f"at most {MAX_VALUE_DIM} dims", value_dim)
    for name, x in (("k", k), ("v", v), ("selection", selection), ("sinks", sinks)):
        is_there = not isinstance(x, Tensor) or x.device == q.device
        require(is_there, name, f"on {q.device}, as q", None if is_there else cast(Tensor, x).device)
    # The kernels read keys by places of 32 bits from the first key of a row.
    require(k.stride(1) * k.shape[1] < 2**31, "k", "rows of fewer than 2^31 numbers", tuple(k.shape))
    shared = isinstance(v, int) and v == parts_of(key_dim, value_dim).a
    values = None if shared else (k[..., :v] if isinstance(v, int) else v)
    if selection.shape[2] == 0:
        selection = selection.new_full((*selection.shape[:2], 1), -1)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    values = values if values is None or values.stride(3) == 1 else values.contiguous()
    tiles = tiles or tiles_for(q.shape[2] // k.shape[2])
    form = Form(scale, value_dim if shared else None, is_deterministic, tiles)
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
    """What all heads take of each chosen key from place `first` of the selection on, s = k - first."""
    rows, tokens, heads, key_dim = q.shape
    groups, kept = k.shape[2], selection.shape[2] - first
    shares = torch.empty(rows, tokens, kept, dtype=torch.float32, device=q.device)
    if kept == 0:
        return shares
    tiles, parts = tiles or tiles_for(heads // groups), parts_of(key_dim, 1)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    selected_shares[(rows * tokens, triton.cdiv(kept, tiles.keys))](
        q, k, selection.contiguous(), lse, shares, tokens, groups, heads // groups, key_dim, first,
        selection.shape[2], kept, scale, *q.stride()[:3], *k.stride()[:3], A=parts.a, B=parts.b,
        HEADS=tiles.heads, KEYS=tiles.keys, num_warps=tiles.warps, num_stages=1,
    )  # fmt: skip
    return shares
