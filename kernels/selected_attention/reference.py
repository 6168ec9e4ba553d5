"""Attention over chosen keys in plain torch: with a mask over all pairs, and with the chosen keys gathered.

Letters: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, D either of them, k
chosen keys, C queries of a chunk, M = B C G. Names m_i, l_i, p, do, dp, ds, delta: those of FlashAttention-2,
arXiv 2307.08691. shares: p of each chosen key, summed over heads.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.query_index import queries_per_chunk

# Elements of gathered keys and values that are in memory at once.
GATHERED = 2**22


def selected_attention_direct(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    selection: Int[Tensor, "B T k"],
    *,
    scale: float,
    sinks: Float[Tensor, "H"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T k"]]:
    """Outputs and shares with the scores of all pairs in memory, in the caller's dtype."""
    tokens, repeat = k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    is_chosen = selection >= 0
    index = torch.where(is_chosen, selection, tokens)
    visible = torch.zeros(*q.shape[:2], tokens + 1, dtype=torch.bool, device=q.device)
    visible = visible.scatter(2, index, torch.ones_like(is_chosen))[:, None, :, :tokens]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    # Without sinks, minus infinity.
    sink = scores.new_full((q.shape[2],), float("-inf")) if sinks is None else sinks
    scores = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    # Where nothing is chosen p is zero, and so are its gradients.
    m_i = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    p = (scores - m_i).exp()
    l_i = p.sum(-1, keepdim=True)
    p = (p / torch.where(l_i > 0, l_i, 1.0))[..., :tokens]
    shares = p.detach().sum(1).gather(2, selection.clamp(min=0))
    return torch.einsum("bhts,bshv->bthv", p, v), shares.masked_fill(~is_chosen, 0.0)


def selected_attention_gathered(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    selection: Int[Tensor, "B T k"],
    *,
    scale: float,
    sinks: Float[Tensor, "H"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T k"]]:
    """Outputs and shares, a chunk of queries at a time; keys are gathered again for backward.

    Computes in float32 at least; outputs take v's dtype.
    """
    numbers = q.shape[0] * selection.shape[2] * k.shape[2] * (k.shape[3] + v.shape[3])
    spec = _Spec(selection, scale, queries_per_chunk(q, numbers, GATHERED), k.shape[1])
    out, shares = cast(tuple[Tensor, Tensor], SelectedAttention.apply(q, k, v, sinks, spec))
    return out, shares


class _Spec(NamedTuple):
    """What does not need a gradient. step: queries of a chunk; keys: S."""

    selection: Tensor
    scale: float
    step: int
    keys: int

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys of the queries in [start, stop) as indices into B S, and which are none; [B C k]."""
        chosen = self.selection[:, start:stop]
        device = chosen.device
        # For none the query's own token is read: no other document is, not even times zero.
        own = torch.arange(start, stop, device=device).clamp(max=self.keys - 1)[:, None]
        row_offsets = torch.arange(len(chosen), device=device)[:, None, None] * self.keys
        return row_offsets + torch.where(chosen < 0, own, chosen), chosen < 0

    def scores(self, q: Tensor, keys: Tensor, is_none: Tensor) -> Tensor:
        """Masked scores [M k H/G], keys first: a product with small transposed keys is slow."""
        scores = torch.bmm(keys, q.mT.contiguous()).mul_(self.scale)
        groups = keys.shape[0] // is_none.shape[:2].numel()
        spread = scores.view(*is_none.shape[:2], groups, *scores.shape[1:])
        spread.masked_fill_(is_none[:, :, None, :, None], float("-inf"))
        return scores


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    # [B S G D] at [B C k] -> [M k D].
    taken = x.flatten(0, 1).index_select(0, rows.flatten())
    return taken.view(*rows.shape, *x.shape[2:]).transpose(2, 3).flatten(0, 2)


def _add_at(into: Tensor, rows: Tensor, grad: Tensor) -> None:
    # The adjoint of _gathered.
    groups = into.shape[2]
    grad_rows = grad.view(rows.shape[0], rows.shape[1], groups, rows.shape[2], -1).transpose(2, 3)
    into.flatten(0, 1).index_add_(0, rows.flatten(), grad_rows.flatten(0, 2))


class SelectedAttention(torch.autograd.Function):
    """q [B T H K], k [B S G K], v [B S G V], sinks [H] or None -> outputs [B T H V], shares [B T k]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spec: _Spec
    ) -> tuple[Tensor, Tensor]:
        """One chunk of queries after the other."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = (x.to(dtype).contiguous() for x in (q, k, v))
        batch, tokens, heads = q.shape[:3]
        groups, lowest = k.shape[2], torch.finfo(dtype).min
        out = values.new_empty(batch, tokens, heads, v.shape[3])
        lse = values.new_empty(batch, tokens, heads)
        shares = values.new_empty(spec.selection.shape)
        for start in range(0, tokens, spec.step):
            stop = min(start + spec.step, tokens)
            rows, is_none = spec.rows(start, stop)
            block = queries[:, start:stop].reshape(-1, heads // groups, q.shape[3])
            scores = spec.scores(block, _gathered(keys, rows), is_none)
            m_i = scores.amax(1, keepdim=True).clamp_(min=lowest)
            sink = None
            if sinks is not None:
                sink = sinks.to(dtype).view(1, groups, 1, -1).expand(batch * (stop - start), -1, -1, -1)
                sink = sink.flatten(0, 1)
                m_i = torch.maximum(m_i, sink)
            p = scores.sub_(m_i).exp_()
            l_i = p.sum(1, keepdim=True)
            if sink is not None:
                l_i = l_i + (sink - m_i).exp()
            # Where nothing is chosen everything is zero.
            l_i = l_i.clamp_(min=torch.finfo(dtype).tiny)
            p = p.div_(l_i)
            o = torch.bmm(p.mT.contiguous(), _gathered(values, rows))
            out[:, start:stop] = o.view_as(out[:, start:stop])
            lse[:, start:stop] = (m_i + l_i.log()).view_as(lse[:, start:stop])
            shares[:, start:stop] = p.view(*is_none.shape[:2], groups, -1, heads // groups).sum((2, 4))
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.spec = spec
        ctx.mark_non_differentiable(shares)
        return out.to(v.dtype), shares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and sinks."""
        q, k, v, sinks, out, lse = ctx.saved_tensors
        spec, dtype, heads, groups = ctx.spec, lse.dtype, q.shape[2], k.shape[2]
        do = grads[0].to(dtype).contiguous()
        delta = (do * out).sum(-1)
        dsinks = None
        if sinks is not None:
            dsinks = -((sinks.to(dtype) - lse).exp() * delta).sum((0, 1)).to(sinks.dtype)
        queries, keys, values = (x.to(dtype).contiguous() for x in (q, k, v))
        dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
        for start in range(0, q.shape[1], spec.step):
            stop = min(start + spec.step, q.shape[1])
            rows, is_none = spec.rows(start, stop)
            taken = _gathered(keys, rows)
            block_q, block_do = (
                x[:, start:stop].reshape(-1, heads // groups, x.shape[3]) for x in (queries, do)
            )
            block_lse, block_delta = (x[:, start:stop].reshape(-1, 1, heads // groups) for x in (lse, delta))
            p = spec.scores(block_q, taken, is_none).sub_(block_lse).exp_()
            _add_at(dv, rows, torch.bmm(p, block_do))
            ds = torch.bmm(_gathered(values, rows), block_do.mT.contiguous())
            ds = ds.sub_(block_delta).mul_(p).mul_(spec.scale)
            _add_at(dk, rows, torch.bmm(ds, block_q))
            block_dq = torch.bmm(ds.mT.contiguous(), taken)
            dq[:, start:stop] = block_dq.view_as(dq[:, start:stop])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None
