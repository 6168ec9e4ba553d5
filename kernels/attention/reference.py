"""Softmax attention in plain torch: with all scores in memory, torch's fused form, and by chunks of queries.

Letters: B rows, T queries, S keys, M keys of a chunk of queries, H query heads, G key heads, K key dim, V
value dim, D either of them, N = B G, F first tokens of a document.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.query_index import QueryChunk, at_queries, q_index_or_arange, query_chunks

# Queries of a chunk, whose scores with all of their keys are in memory at once.
QUERIES = 128


class Pattern(NamedTuple):
    """Which keys before it a query sees; fields as in `kernels.attention.attention`."""

    window: int | None = None
    block: int = 1
    first: int = 0

    def sees(
        self,
        query: Int[Tensor, "#R T 1"],
        key: Int[Tensor, "#R 1 S"],
        doc_start: Int[Tensor, "#R #T 1"] | int,
    ) -> Bool[Tensor, "... T S"]:
        """By index in the row; doc_start: that of the first token of the query's document."""
        visible = key <= query
        if self.window is None:
            return visible
        if self.block == 1:
            in_window = query - key < self.window
        else:
            # Floor division also of keys before the document, which another mask hides.
            query_block = torch.div(query - doc_start, self.block, rounding_mode="floor")
            key_block = torch.div(key - doc_start, self.block, rounding_mode="floor")
            in_window = query_block - key_block < self.window // self.block
        return visible & (in_window | (key - doc_start < self.first) if self.first else in_window)


FULL = Pattern()


def _document_starts(
    pattern: Pattern, position: Tensor | None, keys: int, device: torch.device
) -> Int[Tensor, "R S"] | None:
    # Index in the row at which each token's document starts; None where the pattern does not ask for it.
    if pattern.window is None or (pattern.block == 1 and pattern.first == 0):
        return None
    if position is None:
        return torch.zeros(1, keys, dtype=torch.long, device=device)
    return torch.arange(keys, device=device) - position


def visible_keys(
    q: Float[Tensor, "B T H K"],
    keys: int,
    *,
    pattern: Pattern,
    document: Int[Tensor, "B S"] | None,
    position: Int[Tensor, "B S"] | None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "R T S"]:
    """Which of S = keys each query sees. R is 1 when the rows share one mask, else B."""
    ids, doc_starts = torch.arange(keys, device=q.device), _document_starts(pattern, position, keys, q.device)
    query = q_index_or_arange(q_index, q.shape[1], q)[..., None]
    doc_start = 0 if doc_starts is None else _starts_at_queries(doc_starts, q_index)[..., None]
    visible = pattern.sees(query, ids[None, None], doc_start)
    if document is not None:
        visible = visible & (at_queries(document, q_index)[:, :, None] == document[:, None, :])
    return visible


def _starts_at_queries(doc_starts: Tensor, q_index: Tensor | None) -> Tensor:
    return doc_starts if q_index is None else at_queries(doc_starts.expand(q_index.shape[0], -1), q_index)


def attention_direct(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    *,
    scale: float,
    pattern: Pattern = FULL,
    sinks: Float[Tensor, "H"] | None = None,
    logit_cap: float | None = None,
    document: Int[Tensor, "B S"] | None = None,
    position: Int[Tensor, "B S"] | None = None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """Outputs and log-sum-exp with the scores of all pairs in memory, in the caller's dtype."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    visible = visible_keys(
        q, k.shape[1], pattern=pattern, document=document, position=position, q_index=q_index
    )
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    if logit_cap is not None:
        scores = logit_cap * (scores / logit_cap).tanh()
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[1]]
    return torch.einsum("bhts,bshv->bthv", weights, v), scores.logsumexp(-1).transpose(1, 2)


def attention_fused(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G K"],
    *,
    scale: float,
    pattern: Pattern = FULL,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H K"]:
    """Attention without sinks, cap or blocks by torch's fused kernel; linear in T but for a mask."""
    mask = None
    if pattern.window is not None or document is not None:
        visible = visible_keys(q, k.shape[1], pattern=pattern, document=document, position=None)
        mask = visible[:, None].expand(q.shape[0], 1, -1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
    )
    return out.transpose(1, 2)


def attention_blocked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    *,
    scale: float,
    pattern: Pattern = FULL,
    sinks: Float[Tensor, "H"] | None = None,
    logit_cap: float | None = None,
    document: Int[Tensor, "B S"] | None = None,
    position: Int[Tensor, "B S"] | None = None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """Outputs and log-sum-exp, QUERIES queries at a time; scores are computed again for backward.

    Computes in float32 at least; outputs take v's dtype. A chunk of queries reads the keys from the start of
    its first query's window on, and the first tokens of that query's document: every other document that the
    chunk reaches into starts within the keys read.
    """
    rows, tokens = q.shape[:2]
    doc_starts = _document_starts(pattern, position, k.shape[1], q.device)
    chunks = query_chunks(q_index, tokens, QUERIES)
    spec = _Spec(rows, k.shape[2], scale, pattern, logit_cap, document, doc_starts, q_index, chunks, q.device)
    out, lse = cast(tuple[Tensor, Tensor], BlockedAttention.apply(q, k, v, sinks, spec))
    return out, lse


class _KeyRange(NamedTuple):
    """The keys of a chunk of queries: `early`, indices [N F] into N S, then [start, stop) of each row."""

    early: Tensor | None
    start: int
    stop: int

    def take(self, x: Float[Tensor, "N S D"]) -> Float[Tensor, "N M D"]:
        in_range = x[:, self.start : self.stop]
        return in_range if self.early is None else torch.cat([x.flatten(0, 1)[self.early], in_range], dim=1)

    def add(self, into: Float[Tensor, "N S D"], grad: Float[Tensor, "N M D"]) -> None:
        count = 0
        if self.early is not None:
            count = self.early.shape[1]
            into.flatten(0, 1).index_add_(0, self.early.flatten(), grad[:, :count].flatten(0, 1))
        into[:, self.start : self.stop] += grad[:, count:]


class _Spec(NamedTuple):
    """What does not need a gradient."""

    rows: int
    key_heads: int
    scale: float
    pattern: Pattern
    logit_cap: float | None
    document: Tensor | None
    doc_starts: Tensor | None
    q_index: Tensor | None
    chunks: list[QueryChunk]
    device: torch.device

    def keys(self, chunk: QueryChunk, tokens: int) -> tuple[_KeyRange, Tensor]:
        """The keys of a chunk of queries, and which each query sees, [R T M]; `tokens`: length of the row."""
        window, _, first = self.pattern
        low = 0 if window is None else max(0, chunk.key_start - window + 1)
        keys, index = torch.arange(low, chunk.key_stop, device=self.device)[None], None
        if self.q_index is None:
            query = torch.arange(chunk.start, chunk.stop, device=self.device)[None]
        else:
            query = self.q_index[:, chunk.start : chunk.stop].long()
        doc_start = None if self.doc_starts is None else self._at_chunk(self.doc_starts, chunk)
        count = min(first, low)
        if count:
            assert doc_start is not None
            early = doc_start[:, :1] + torch.arange(count, device=self.device)
            # From `low` on keys are read as part of the window.
            early_keys = torch.where(early < low, early, tokens)
            row = torch.arange(self.rows, device=self.device)[:, None] * self.key_heads
            head = torch.arange(self.key_heads, device=self.device)
            row_offsets = (row + head).flatten()[:, None] * tokens
            chosen = early.clamp(max=low).expand(self.rows, -1).repeat_interleave(self.key_heads, dim=0)
            index = row_offsets + chosen
            keys = torch.cat([early_keys, keys.expand(early.shape[0], -1)], dim=1)
        visible = self.pattern.sees(
            query[..., None], keys[:, None], 0 if doc_start is None else doc_start[..., None]
        )
        if self.document is not None:
            seen = self.document.gather(1, keys.clamp(max=tokens - 1).expand(self.rows, -1))
            visible = visible & (self._at_chunk(self.document, chunk)[..., None] == seen[:, None])
        return _KeyRange(index, low, chunk.key_stop), visible

    def _at_chunk(self, x: Tensor, chunk: QueryChunk) -> Tensor:
        if self.q_index is None:
            return x[:, chunk.start : chunk.stop]
        return at_queries(x.expand(self.rows, -1), self.q_index[:, chunk.start : chunk.stop])

    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> tuple[Tensor, Tensor | None]:
        """Masked scores [N, T H/G, M], and the derivative of the cap at each."""
        scores, slope = torch.bmm(q, k.mT.contiguous()).mul_(self.scale), None
        if self.logit_cap is not None:
            scores = scores.div_(self.logit_cap).tanh_()
            slope = 1 - scores.square()
            scores = scores.mul_(self.logit_cap)
        repeat = scores.shape[1] // visible.shape[1]
        spread = scores.view(self.rows, self.key_heads, -1, repeat, scores.shape[2])
        spread.masked_fill_(~visible[:, None, :, None], float("-inf"))
        return scores, slope


class BlockedAttention(torch.autograd.Function):
    """q [B T H K], k [B S G K], v [B S G V], sinks [H] or None -> outputs [B T H V], log-sum-exp [B T H]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spec: _Spec
    ) -> tuple[Tensor, Tensor]:
        """FlashAttention-2's row statistics, a chunk of queries at a time with all of its keys."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        tokens, heads, key_heads = k.shape[1], q.shape[2], k.shape[2]
        queries, keys, values = (_per_key_head(x, key_heads, dtype) for x in (q, k, v))
        out = values.new_empty(*queries.shape[:3], values.shape[-1])
        lse = values.new_empty(queries.shape[:3])
        row_sinks = None if sinks is None else _sinks_per_key_head(sinks.to(dtype), spec.rows, key_heads)
        for chunk in spec.chunks:
            start, stop = chunk.start, chunk.stop
            key_range, visible = spec.keys(chunk, tokens)
            scores, _ = spec.scores(
                queries[:, start:stop].flatten(1, 2), key_range.take(keys[:, :, 0]), visible
            )
            m_i = scores.amax(-1, keepdim=True)
            sink = None if row_sinks is None else row_sinks.repeat(1, stop - start)[..., None]
            if sink is not None:
                m_i = torch.maximum(m_i, sink)
            p = scores.sub_(m_i).exp_()
            l_i = p.sum(-1, keepdim=True)
            if sink is not None:
                l_i = l_i + (sink - m_i).exp()
            o = torch.bmm(p, key_range.take(values[:, :, 0])).div_(l_i)
            out[:, start:stop] = o.view_as(out[:, start:stop])
            lse[:, start:stop] = (m_i + l_i.log()).view_as(lse[:, start:stop])
        out = _from_key_heads(out, spec.rows, heads)
        lse = _from_key_heads(lse[..., None], spec.rows, heads)[..., 0]
        result = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return result, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and sinks."""
        q, k, v, sinks, out, lse = ctx.saved_tensors
        spec, dtype, key_heads = ctx.spec, lse.dtype, k.shape[2]
        do = torch.zeros_like(out) if grads[0] is None else grads[0].to(dtype)
        # ds = p (dp - delta); the gradient of the log-sum-exp enters through delta, too.
        delta = (do * out).sum(-1)
        if grads[1] is not None:
            delta = delta - grads[1]
        dsinks = None
        if sinks is not None:
            dsinks = -((sinks.to(dtype) - lse).exp() * delta).sum((0, 1)).to(sinks.dtype)
        queries, keys, values, do = (_per_key_head(x, key_heads, dtype) for x in (q, k, v, do))
        delta, lse = (_per_key_head(x[..., None], key_heads, dtype) for x in (delta, lse))
        dq, dk = torch.empty_like(queries), torch.zeros_like(keys[:, :, 0])
        dv = torch.zeros_like(values[:, :, 0])
        tokens = k.shape[1]
        for chunk in spec.chunks:
            start, stop = chunk.start, chunk.stop
            key_range, visible = spec.keys(chunk, tokens)
            block_q, block_do, block_delta, block_lse = (
                x[:, start:stop].flatten(1, 2) for x in (queries, do, delta, lse)
            )
            block_k = key_range.take(keys[:, :, 0])
            scores, slope = spec.scores(block_q, block_k, visible)
            p = scores.sub_(block_lse).exp_()
            key_range.add(dv, torch.bmm(p.mT, block_do))
            ds = torch.bmm(block_do, key_range.take(values[:, :, 0]).mT.contiguous())
            ds = ds.sub_(block_delta).mul_(p).mul_(spec.scale)
            if slope is not None:
                ds.mul_(slope)
            dq[:, start:stop] = torch.bmm(ds, block_k).view_as(dq[:, start:stop])
            key_range.add(dk, torch.bmm(ds.mT, block_q))
        dq = _from_key_heads(dq, spec.rows, q.shape[2]).to(q.dtype)
        dk, dv = (_from_key_heads(x[:, :, None], spec.rows, key_heads).to(k.dtype) for x in (dk, dv))
        return dq, dk, dv, dsinks, None


def _per_key_head(x: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    # [B T H D] -> [N T H/G D]: the query heads of a key head together, as one matrix.
    x = x.to(dtype).unflatten(2, (key_heads, -1)).transpose(1, 2)
    return x.contiguous().flatten(0, 1)


def _from_key_heads(x: Tensor, rows: int, heads: int) -> Tensor:
    # The inverse of _per_key_head: [N T H/G D] -> [B T H D].
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3).contiguous()


def _sinks_per_key_head(x: Tensor, rows: int, key_heads: int) -> Tensor:
    # [H] -> [N H/G].
    return x.view(key_heads, -1).repeat(rows, 1)
