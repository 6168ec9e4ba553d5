"""Softmax attention in plain torch: the direct form, torch's fused form, and the form in blocks of queries.

Letters: B rows, T queries, S keys, M keys of a block of queries, H query heads, G key heads, K key dim, V
value dim, W window, N = B G.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.places import Span, at_places, query_tokens, spans

# Queries of a block: its scores with all their keys are in memory at once.
QUERIES = 128


class Pattern(NamedTuple):
    """Which keys before it a query sees; fields as in `kernels.attention.attention`."""

    window: int | None = None
    block: int = 1
    first: int = 0

    def sees(
        self, query: Int[Tensor, "#R T 1"], key: Int[Tensor, "#R 1 S"], base: Int[Tensor, "#R #T 1"] | int
    ) -> Bool[Tensor, "... T S"]:
        """By places in the row; `base` is where the query's document starts, wherever that matters."""
        visible = key <= query
        if self.window is None:
            return visible
        if self.block == 1:
            near = query - key < self.window
        else:
            # Floor division, so that keys before the document are far; another mask takes those.
            query_block = torch.div(query - base, self.block, rounding_mode="floor")
            key_block = torch.div(key - base, self.block, rounding_mode="floor")
            near = query_block - key_block < self.window // self.block
        return visible & (near | (key - base < self.first) if self.first else near)


FULL = Pattern()


def _bases(
    pattern: Pattern, position: Tensor | None, keys: int, device: torch.device
) -> Int[Tensor, "R S"] | None:
    # Where each token's document starts in the row; None where the pattern does not ask.
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
    places: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "R T S"]:
    """Which of S = keys each query sees. R is 1 when the rows share one mask, else B."""
    ids, bases = torch.arange(keys, device=q.device), _bases(pattern, position, keys, q.device)
    query = query_tokens(places, q.shape[1], q)[..., None]
    base = 0 if bases is None else _of_queries(bases, places)[..., None]
    visible = pattern.sees(query, ids[None, None], base)
    if document is not None:
        visible = visible & (at_places(document, places)[:, :, None] == document[:, None, :])
    return visible


def _of_queries(bases: Tensor, places: Tensor | None) -> Tensor:
    return bases if places is None else at_places(bases.expand(places.shape[0], -1), places)


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
    places: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """Outputs and log-sum-exp with the scores of all pairs in memory, in the caller's dtype."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    visible = visible_keys(
        q, k.shape[1], pattern=pattern, document=document, position=position, places=places
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
    places: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """Outputs and log-sum-exp, QUERIES queries at a time; scores are computed again for backward.

    Computes in float32 at least; outputs take v's dtype. A block of queries reads the keys from the first in
    its window on, and the first tokens of one document: any other document that it reaches into starts among
    those keys.
    """
    rows, tokens = q.shape[:2]
    bases = _bases(pattern, position, k.shape[1], q.device)
    parts = spans(places, tokens, QUERIES)
    spec = _Spec(rows, k.shape[2], scale, pattern, logit_cap, document, bases, places, parts, q.device)
    out, lse = cast(tuple[Tensor, Tensor], BlockedAttention.apply(q, k, v, sinks, spec))
    return out, lse


class _Keys(NamedTuple):
    """The keys of a block: `early` [N F] into N S for the first tokens, and [start, stop) of the row."""

    early: Tensor | None
    start: int
    stop: int

    def take(self, x: Float[Tensor, "N S D"]) -> Float[Tensor, "N M D"]:
        near = x[:, self.start : self.stop]
        return near if self.early is None else torch.cat([x.flatten(0, 1)[self.early], near], dim=1)

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
    bases: Tensor | None
    places: Tensor | None
    spans: list[Span]
    device: torch.device

    def keys(self, span: Span, tokens: int) -> tuple[_Keys, Tensor]:
        """The keys of the queries of a span, and which each sees, [R T M]; `tokens` are those of the row."""
        window, _, first = self.pattern
        low = 0 if window is None else max(0, span.low - window + 1)
        keys, index = torch.arange(low, span.high, device=self.device)[None], None
        if self.places is None:
            query = torch.arange(span.start, span.stop, device=self.device)[None]
        else:
            query = self.places[:, span.start : span.stop].long()
        base = None if self.bases is None else self._of_queries(self.bases, span)
        count = min(first, low)
        if count:
            assert base is not None
            early = base[:, :1] + torch.arange(count, device=self.device)
            # From low on a key is among the near ones already.
            early_keys = torch.where(early < low, early, tokens)
            row = torch.arange(self.rows, device=self.device)[:, None] * self.key_heads
            head = torch.arange(self.key_heads, device=self.device)
            lines = (row + head).flatten()[:, None] * tokens
            chosen = early.clamp(max=low).expand(self.rows, -1).repeat_interleave(self.key_heads, dim=0)
            index = lines + chosen
            keys = torch.cat([early_keys, keys.expand(early.shape[0], -1)], dim=1)
        visible = self.pattern.sees(query[..., None], keys[:, None], 0 if base is None else base[..., None])
        if self.document is not None:
            seen = self.document.gather(1, keys.clamp(max=tokens - 1).expand(self.rows, -1))
            visible = visible & (self._of_queries(self.document, span)[..., None] == seen[:, None])
        return _Keys(index, low, span.high), visible

    def _of_queries(self, x: Tensor, span: Span) -> Tensor:
        if self.places is None:
            return x[:, span.start : span.stop]
        return at_places(x.expand(self.rows, -1), self.places[:, span.start : span.stop])

    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> tuple[Tensor, Tensor | None]:
        """Masked scores [N, T H/G, M], and the slope of the cap at each."""
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
        """One block of queries after the other."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        tokens, heads, key_heads = k.shape[1], q.shape[2], k.shape[2]
        queries, keys, values = (_lines(x, key_heads, dtype) for x in (q, k, v))
        out = values.new_empty(*queries.shape[:3], values.shape[-1])
        lse = values.new_empty(queries.shape[:3])
        extra = None if sinks is None else _per_line(sinks.to(dtype), spec.rows, key_heads)
        for span in spec.spans:
            start, stop = span.start, span.stop
            place, visible = spec.keys(span, tokens)
            scores, _ = spec.scores(queries[:, start:stop].flatten(1, 2), place.take(keys[:, :, 0]), visible)
            top = scores.amax(-1, keepdim=True)
            extras = None if extra is None else extra.repeat(1, stop - start)[..., None]
            if extras is not None:
                top = torch.maximum(top, extras)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            if extras is not None:
                total = total + (extras - top).exp()
            mixed = torch.bmm(weights, place.take(values[:, :, 0])).div_(total)
            out[:, start:stop] = mixed.view_as(out[:, start:stop])
            lse[:, start:stop] = (top + total.log()).view_as(lse[:, start:stop])
        out = _unlines(out, spec.rows, heads)
        lse = _unlines(lse[..., None], spec.rows, heads)[..., 0]
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
        grad_out = torch.zeros_like(out) if grads[0] is None else grads[0].to(dtype)
        # A score gets p (dp - pull): the mean of dp under p, less what the log-sum-exp gets itself.
        pull = (grad_out * out).sum(-1)
        if grads[1] is not None:
            pull = pull - grads[1]
        grad_sinks = None
        if sinks is not None:
            grad_sinks = -((sinks.to(dtype) - lse).exp() * pull).sum((0, 1)).to(sinks.dtype)
        queries, keys, values, grad_out = (_lines(x, key_heads, dtype) for x in (q, k, v, grad_out))
        pull, lse = (_lines(x[..., None], key_heads, dtype) for x in (pull, lse))
        grad_q, grad_k = torch.empty_like(queries), torch.zeros_like(keys[:, :, 0])
        grad_v = torch.zeros_like(values[:, :, 0])
        tokens = k.shape[1]
        for span in spec.spans:
            start, stop = span.start, span.stop
            place, visible = spec.keys(span, tokens)
            block_q, block_grad, block_pull, block_lse = (
                x[:, start:stop].flatten(1, 2) for x in (queries, grad_out, pull, lse)
            )
            block_k = place.take(keys[:, :, 0])
            scores, slope = spec.scores(block_q, block_k, visible)
            weights = scores.sub_(block_lse).exp_()
            place.add(grad_v, torch.bmm(weights.mT, block_grad))
            grad_scores = torch.bmm(block_grad, place.take(values[:, :, 0]).mT.contiguous())
            grad_scores = grad_scores.sub_(block_pull).mul_(weights).mul_(spec.scale)
            if slope is not None:
                grad_scores.mul_(slope)
            grad_q[:, start:stop] = torch.bmm(grad_scores, block_k).view_as(grad_q[:, start:stop])
            place.add(grad_k, torch.bmm(grad_scores.mT, block_q))
        grad_q = _unlines(grad_q, spec.rows, q.shape[2]).to(q.dtype)
        grad_k, grad_v = (_unlines(x[:, :, None], spec.rows, key_heads).to(k.dtype) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, grad_sinks, None


def _lines(x: Tensor, key_heads: int, dtype: torch.dtype) -> Tensor:
    # [B T H D] -> [N T H/G D]: the query heads of a key head stand together, so that they are one product.
    x = x.to(dtype).unflatten(2, (key_heads, -1)).transpose(1, 2)
    return x.contiguous().flatten(0, 1)


def _unlines(x: Tensor, rows: int, heads: int) -> Tensor:
    # The inverse of _lines: [N T H/G D] -> [B T H D].
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3).contiguous()


def _per_line(x: Tensor, rows: int, key_heads: int) -> Tensor:
    # [H] -> [N H/G].
    return x.view(key_heads, -1).repeat(rows, 1)
