"""Attention over selected blocks in plain torch: the direct form with a mask, and the form that gathers.

Letters: B rows, T queries, S keys, H query heads, G key heads, J selecting heads, R query heads of a
selection, K key dim, V value dim, C tokens of a block, N slots, n selected blocks, Q queries of a slab, M
keys beside a slab.
"""

from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.document_windows import document_windows
from kernels.places import Span, at_places, queries_at_once, query_tokens, spans

# Elements that a slab of queries may gather: bounds memory, not the result.
SLAB = 1 << 23


def visible_keys(
    selected: Int[Tensor, "B T J n"],
    *,
    block: int,
    position: Int[Tensor, "B S"],
    places: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B T J m S"]:
    """Which keys each query sees in its own block and in each selected one, m = n + 1."""
    tokens = position.shape[1]
    key = torch.arange(tokens, device=position.device)
    query = query_tokens(places, tokens, position)
    own = (query - at_places(position, places) % block)[..., None]
    is_own = (key >= own) & (key <= query[..., None])
    windows = document_windows(position, block, block)
    rows = torch.arange(position.shape[0], device=position.device)[:, None, None, None]
    if windows.start.shape[1] == 0:
        is_selected = selected.new_zeros(*selected.shape, tokens, dtype=torch.bool)
    else:
        start = windows.start[rows, selected.clamp(min=0)][..., None]
        is_selected = (selected >= 0)[..., None] & (key >= start) & (key < start + block)
    return torch.cat([is_own[:, :, None, None].expand(-1, -1, selected.shape[2], -1, -1), is_selected], dim=3)


def block_attention_direct(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    selected: Int[Tensor, "B T J n"],
    *,
    scale: float,
    block: int,
    position: Int[Tensor, "B S"],
    places: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T J m"]]:
    """Attention with the scores of all pairs in memory, in the caller's dtype."""
    heads, selectors = q.shape[2], selected.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    parts = visible_keys(selected, block=block, position=position, places=places)
    visible = parts.any(3).repeat_interleave(heads // selectors, dim=2)
    scores = torch.einsum("bthk,bshk->bths", q, k) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    grouped = weights.detach().unflatten(2, (selectors, -1)).sum(3)
    mass = torch.einsum("btjs,btjms->btjm", grouped, parts.to(grouped.dtype))
    return torch.einsum("bths,bshv->bthv", weights, v), mass


def block_attention_gathered(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    selected: Int[Tensor, "B T J n"],
    *,
    scale: float,
    block: int,
    position: Int[Tensor, "B S"],
    places: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T J m"]]:
    """Attention over gathered blocks, a slab of queries at a time; computes in float32 at least."""
    dtype, out_dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    windows = document_windows(position, block, block)
    # [B N C G E] -> [B N G, C E]: one line per block and key head.
    tables = [windows.gather(x).transpose(2, 3).flatten(0, 2).flatten(1) for x in (k, v)]
    lines = _lines(selected, windows.start.shape[1], k.shape[2])
    token, inside = query_tokens(places, q.shape[1], q), at_places(position, places) % block
    slabs = spans(places, q.shape[1], _slab(q, v, selected, block))
    out, mass = cast(
        tuple[Tensor, Tensor],
        GatheredBlockAttention.apply(
            q, k, v, *tables, lines, selected >= 0, token, inside, slabs, block, scale
        ),
    )
    return out.to(out_dtype), mass


def _lines(selected: Tensor, slots: int, key_heads: int) -> Tensor:
    # Lines of the tables: by row, slot, key head.
    rows, _, selectors, _ = selected.shape
    row = torch.arange(rows, device=selected.device)[:, None, None, None]
    head = torch.arange(selectors, device=selected.device)[:, None] // (selectors // key_heads)
    return (row * slots + selected.clamp(min=0)) * key_heads + head


class _Slab(NamedTuple):
    """What a slab of queries attends to: keys beside it by mask, and gathered blocks by mask."""

    near_k: Tensor
    near_v: Tensor
    far_k: Tensor
    far_v: Tensor
    near: Tensor
    far: Tensor


class GatheredBlockAttention(torch.autograd.Function):
    """The gathered form; blocks are gathered again in backward instead of being kept.

    q [B T H K], k, v [B S G E], tables [B N G, C E], lines and is_selected [B T J n], token [1 T] or [B T]:
    where a query stands in its row; inside [B T]: and in its own block.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_table: Tensor,
        v_table: Tensor,
        lines: Tensor,
        is_selected: Tensor,
        token: Tensor,
        inside: Tensor,
        slabs: list[Span],
        block: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Outputs, and the attention by block."""
        ctx.slabs, ctx.block, ctx.scale = slabs, block, scale
        inputs = (q, k, v, k_table, v_table, lines, is_selected, token, inside)
        out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
        mass = q.new_empty(*lines.shape[:3], lines.shape[3] + 1)
        for span in slabs:
            a, b = span.start, span.stop
            slab = _take(inputs, span, block)
            near, far = _scores(q[:, a:b] * scale, slab)
            lse[:, a:b] = torch.cat([near, far], dim=-1).logsumexp(-1)
            near, far = (part.sub_(lse[:, a:b, :, None]).exp_() for part in (near, far))
            out[:, a:b] = _weighted(near, far, slab)
            near, far = (part.unflatten(2, (lines.shape[2], -1)).sum(3) for part in (near, far))
            mass[:, a:b, :, 0] = near.sum(-1)
            mass[:, a:b, :, 1:] = far.unflatten(-1, (-1, block)).sum(-1)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the tables."""
        *inputs, out, lse = ctx.saved_tensors
        q, k, _, lines = *inputs[:3], inputs[5]
        grad_out, delta = grads[0], (grads[0] * out).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v, grad_k_table, grad_v_table = (torch.zeros_like(x) for x in inputs[:5])
        groups, selectors = k.shape[2], lines.shape[2]
        for span in ctx.slabs:
            a, b = span.start, span.stop
            slab = _take(inputs, span, ctx.block)
            first = max(0, span.low - ctx.block + 1)
            scaled, going = q[:, a:b] * ctx.scale, grad_out[:, a:b]
            near, far = (part.sub_(lse[:, a:b, :, None]).exp_() for part in _scores(scaled, slab))
            pulls = _products(going, slab.near_v, slab.far_v)
            by_near, by_far = (
                weight * (pull - delta[:, a:b]) for weight, pull in zip((near, far), pulls, strict=True)
            )
            grad_q[:, a:b] = _weighted(by_near, by_far, slab._replace(near_v=slab.near_k, far_v=slab.far_k))
            for by, x, grad in ((by_near, scaled, grad_k), (near, going, grad_v)):
                grad[:, first : span.high] += torch.einsum(
                    "bqgrs,bqgre->bsge", by.unflatten(2, (groups, -1)), x.unflatten(2, (groups, -1))
                )
            if lines.shape[3] == 0:
                continue
            for by, x, grad in ((by_far, scaled, grad_k_table), (far, going, grad_v_table)):
                by, x = by.unflatten(2, (selectors, -1)), x.unflatten(2, (selectors, -1))
                grad.index_add_(0, lines[:, a:b].flatten(), (by.mT @ x).view(-1, grad.shape[1]))
        return grad_q * ctx.scale, grad_k, grad_v, grad_k_table, grad_v_table, *(None,) * 7


def _slab(q: Tensor, v: Tensor, selected: Tensor, block: int) -> int:
    per_query = q.shape[0] * selected.shape[2] * (selected.shape[3] + 1) * block * (q.shape[3] + v.shape[3])
    return queries_at_once(q, per_query, SLAB)


def _take(inputs: tuple[Tensor, ...] | list[Tensor], span: Span, block: int) -> _Slab:
    _, k, v, k_table, v_table, lines, is_selected, token, inside = inputs
    a, b, first = span.start, span.stop, max(0, span.low - block + 1)
    key = torch.arange(first, span.high, device=k.device)
    query = token[:, a:b, None]
    near = (key <= query) & (key >= query - inside[:, a:b, None])
    chosen = lines[:, a:b]
    far_k, far_v = (
        table[chosen.flatten()].view(*chosen.shape[:3], chosen.shape[3] * block, x.shape[-1])
        for table, x in ((k_table, k), (v_table, v))
    )
    far = is_selected[:, a:b].repeat_interleave(block, dim=-1)
    beside = slice(first, span.high)
    return _Slab(k[:, beside], v[:, beside], far_k, far_v, near, far)


def _products(x: Tensor, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """x [B Q H E] with each key beside it [B Q H M] and each gathered one [B Q H nC]."""
    beside = torch.einsum("bqgre,bsge->bqgrs", x.unflatten(2, (near.shape[2], -1)), near).flatten(2, 3)
    x = x.unflatten(2, (far.shape[2], -1))
    # The gathered keys are the large factor: they stay as they lie, and the small one is turned.
    gathered = (far @ x.mT.contiguous()).mT.flatten(2, 3)
    return beside, gathered


def _scores(q: Tensor, slab: _Slab) -> tuple[Tensor, Tensor]:
    near, far = _products(q, slab.near_k, slab.far_k)
    repeat = q.shape[2] // slab.far.shape[2]
    is_far = slab.far.repeat_interleave(repeat, dim=2)
    return near.masked_fill(~slab.near[:, :, None], float("-inf")), far.masked_fill(~is_far, float("-inf"))


def _weighted(near: Tensor, far: Tensor, slab: _Slab) -> Tensor:
    groups, selectors = slab.near_v.shape[2], slab.far_v.shape[2]
    beside = torch.einsum("bqgrs,bsge->bqgre", near.unflatten(2, (groups, -1)), slab.near_v).flatten(2, 3)
    return beside + (far.unflatten(2, (selectors, -1)) @ slab.far_v).flatten(2, 3)
