"""Attention over selected blocks in plain torch: with a mask over all pairs, and with gathered blocks.

Letters: B rows, T queries, S keys, H query heads, G key heads, J selecting heads, R query heads of a
selection, K key dim, V value dim, E either of them, C tokens of a block, N slots of blocks, n selected
blocks, Q queries of a chunk, M keys of their own blocks.
"""

from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.document_windows import document_windows
from kernels.query_index import QueryChunk, at_queries, q_index_or_arange, queries_per_chunk, query_chunks

# Elements that a chunk of queries may gather: bounds memory, not the result.
CHUNK_ELEMENTS = 1 << 23


def visible_keys(
    selected: Int[Tensor, "B T J n"],
    *,
    block: int,
    position: Int[Tensor, "B S"],
    q_index: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B T J m S"]:
    """Which keys each query sees in its own block and in each selected one, m = n + 1."""
    tokens = position.shape[1]
    key = torch.arange(tokens, device=position.device)
    query = q_index_or_arange(q_index, tokens, position)
    own = (query - at_queries(position, q_index) % block)[..., None]
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
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T J m"]]:
    """Attention with the scores of all pairs in memory, in the caller's dtype."""
    heads, selectors = q.shape[2], selected.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    parts = visible_keys(selected, block=block, position=position, q_index=q_index)
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
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T J m"]]:
    """Attention over gathered blocks, a chunk of queries at a time; computes in float32 at least."""
    dtype, out_dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    windows = document_windows(position, block, block)
    # [B N C G E] -> [B N G, C E]: one row per block and key head.
    tables = [windows.gather(x).transpose(2, 3).flatten(0, 2).flatten(1) for x in (k, v)]
    table_rows = _table_rows(selected, windows.start.shape[1], k.shape[2])
    token, block_offset = q_index_or_arange(q_index, q.shape[1], q), at_queries(position, q_index) % block
    chunks = query_chunks(q_index, q.shape[1], _chunk_size(q, v, selected, block))
    out, mass = cast(
        tuple[Tensor, Tensor],
        GatheredBlockAttention.apply(
            q, k, v, *tables, table_rows, selected >= 0, token, block_offset, chunks, block, scale
        ),
    )
    return out.to(out_dtype), mass


def _table_rows(selected: Tensor, slots: int, key_heads: int) -> Tensor:
    # Indices of the selected blocks in a table of all, by row, slot and key head.
    rows, _, selectors, _ = selected.shape
    row = torch.arange(rows, device=selected.device)[:, None, None, None]
    head = torch.arange(selectors, device=selected.device)[:, None] // (selectors // key_heads)
    return (row * slots + selected.clamp(min=0)) * key_heads + head


class _Attended(NamedTuple):
    """What a chunk of queries attends to: the keys of its own blocks, selected blocks, and a mask of each."""

    own_k: Tensor
    own_v: Tensor
    selected_k: Tensor
    selected_v: Tensor
    sees_own: Tensor
    sees_selected: Tensor


class GatheredBlockAttention(torch.autograd.Function):
    """Attention over gathered blocks, which are gathered again in backward instead of being kept.

    q [B T H K], k, v [B S G E], tables [B N G, C E], table_rows and is_selected [B T J n]; token, [1 T] or
    [B T]: index of each query in its row of keys; block_offset [B T]: and in its own block.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_table: Tensor,
        v_table: Tensor,
        table_rows: Tensor,
        is_selected: Tensor,
        token: Tensor,
        block_offset: Tensor,
        chunks: list[QueryChunk],
        block: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Outputs, and the attention on each block."""
        ctx.chunks, ctx.block, ctx.scale = chunks, block, scale
        inputs = (q, k, v, k_table, v_table, table_rows, is_selected, token, block_offset)
        out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
        mass = q.new_empty(*table_rows.shape[:3], table_rows.shape[3] + 1)
        for chunk in chunks:
            a, b = chunk.start, chunk.stop
            attended = _take(inputs, chunk, block)
            scores = _scores(q[:, a:b] * scale, attended)
            lse[:, a:b] = torch.cat(scores, dim=-1).logsumexp(-1)
            p_own, p_selected = (s.sub_(lse[:, a:b, :, None]).exp_() for s in scores)
            out[:, a:b] = _weighted(p_own, p_selected, attended)
            by_head = (p.unflatten(2, (table_rows.shape[2], -1)).sum(3) for p in (p_own, p_selected))
            p_own, p_selected = by_head
            mass[:, a:b, :, 0] = p_own.sum(-1)
            mass[:, a:b, :, 1:] = p_selected.unflatten(-1, (-1, block)).sum(-1)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the tables."""
        *inputs, out, lse = ctx.saved_tensors
        q, k, _, table_rows = *inputs[:3], inputs[5]
        do, delta = grads[0], (grads[0] * out).sum(-1, keepdim=True)
        dq, dk, dv, dk_table, dv_table = (torch.zeros_like(x) for x in inputs[:5])
        groups, selectors = k.shape[2], table_rows.shape[2]
        for chunk in ctx.chunks:
            a, b = chunk.start, chunk.stop
            attended = _take(inputs, chunk, ctx.block)
            first = max(0, chunk.key_start - ctx.block + 1)
            scaled, do_chunk = q[:, a:b] * ctx.scale, do[:, a:b]
            p_own, p_selected = (s.sub_(lse[:, a:b, :, None]).exp_() for s in _scores(scaled, attended))
            dps = _products(do_chunk, attended.own_v, attended.selected_v)
            ds_own, ds_selected = (
                p * (dp - delta[:, a:b]) for p, dp in zip((p_own, p_selected), dps, strict=True)
            )
            dq[:, a:b] = _weighted(
                ds_own, ds_selected, attended._replace(own_v=attended.own_k, selected_v=attended.selected_k)
            )
            for by, x, grad in ((ds_own, scaled, dk), (p_own, do_chunk, dv)):
                grad[:, first : chunk.key_stop] += torch.einsum(
                    "bqgrs,bqgre->bsge", by.unflatten(2, (groups, -1)), x.unflatten(2, (groups, -1))
                )
            if table_rows.shape[3] == 0:
                continue
            for by, x, grad in ((ds_selected, scaled, dk_table), (p_selected, do_chunk, dv_table)):
                by, x = by.unflatten(2, (selectors, -1)), x.unflatten(2, (selectors, -1))
                grad.index_add_(0, table_rows[:, a:b].flatten(), (by.mT @ x).view(-1, grad.shape[1]))
        return dq * ctx.scale, dk, dv, dk_table, dv_table, *(None,) * 7


def _chunk_size(q: Tensor, v: Tensor, selected: Tensor, block: int) -> int:
    per_query = q.shape[0] * selected.shape[2] * (selected.shape[3] + 1) * block * (q.shape[3] + v.shape[3])
    return queries_per_chunk(q, per_query, CHUNK_ELEMENTS)


def _take(inputs: tuple[Tensor, ...] | list[Tensor], chunk: QueryChunk, block: int) -> _Attended:
    _, k, v, k_table, v_table, table_rows, is_selected, token, block_offset = inputs
    a, b, first = chunk.start, chunk.stop, max(0, chunk.key_start - block + 1)
    key = torch.arange(first, chunk.key_stop, device=k.device)
    query = token[:, a:b, None]
    sees_own = (key <= query) & (key >= query - block_offset[:, a:b, None])
    chosen = table_rows[:, a:b]
    selected_k, selected_v = (
        table[chosen.flatten()].view(*chosen.shape[:3], chosen.shape[3] * block, x.shape[-1])
        for table, x in ((k_table, k), (v_table, v))
    )
    sees_selected = is_selected[:, a:b].repeat_interleave(block, dim=-1)
    own_keys = slice(first, chunk.key_stop)
    return _Attended(k[:, own_keys], v[:, own_keys], selected_k, selected_v, sees_own, sees_selected)


def _products(x: Tensor, own: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Products of x [B Q H E] with each key of the own blocks [B Q H M] and each selected one [B Q H nC]."""
    with_own = torch.einsum("bqgre,bsge->bqgrs", x.unflatten(2, (own.shape[2], -1)), own).flatten(2, 3)
    x = x.unflatten(2, (selected.shape[2], -1))
    # The gathered keys are the large factor: the small one is transposed.
    with_selected = (selected @ x.mT.contiguous()).mT.flatten(2, 3)
    return with_own, with_selected


def _scores(q: Tensor, attended: _Attended) -> tuple[Tensor, Tensor]:
    s_own, s_selected = _products(q, attended.own_k, attended.selected_k)
    repeat = q.shape[2] // attended.sees_selected.shape[2]
    is_selected = attended.sees_selected.repeat_interleave(repeat, dim=2)
    s_own = s_own.masked_fill(~attended.sees_own[:, :, None], float("-inf"))
    return s_own, s_selected.masked_fill(~is_selected, float("-inf"))


def _weighted(p_own: Tensor, p_selected: Tensor, attended: _Attended) -> Tensor:
    groups, selectors = attended.own_v.shape[2], attended.selected_v.shape[2]
    out_own = torch.einsum("bqgrs,bsge->bqgre", p_own.unflatten(2, (groups, -1)), attended.own_v).flatten(
        2, 3
    )
    return out_own + (p_selected.unflatten(2, (selectors, -1)) @ attended.selected_v).flatten(2, 3)
