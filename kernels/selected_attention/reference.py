"""Attention over chosen keys in plain torch: masked out of all pairs, and with the chosen keys gathered.

Letters: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, k chosen keys, C
queries of a block, M = B C G.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.places import queries_at_once

# Numbers of gathered keys and values that are in memory at once.
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
    places = torch.where(is_chosen, selection, tokens)
    visible = torch.zeros(*q.shape[:2], tokens + 1, dtype=torch.bool, device=q.device)
    visible = visible.scatter(2, places, torch.ones_like(is_chosen))[:, None, :, :tokens]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    # A sink of minus infinity stands for none.
    column = scores.new_full((q.shape[2],), float("-inf")) if sinks is None else sinks
    scores = torch.cat([scores, column[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    # Where nothing is chosen the weights are zero, and so are their gradients.
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    weights = (weights / torch.where(total > 0, total, 1.0))[..., :tokens]
    shares = weights.detach().sum(1).gather(2, selection.clamp(min=0))
    return torch.einsum("bhts,bshv->bthv", weights, v), shares.masked_fill(~is_chosen, 0.0)


def selected_attention_gathered(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    selection: Int[Tensor, "B T k"],
    *,
    scale: float,
    sinks: Float[Tensor, "H"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T k"]]:
    """Outputs and shares, a block of queries at a time; keys are gathered again for backward.

    Computes in float32 at least; outputs take v's dtype.
    """
    numbers = q.shape[0] * selection.shape[2] * k.shape[2] * (k.shape[3] + v.shape[3])
    spec = _Spec(selection, scale, queries_at_once(q, numbers, GATHERED), k.shape[1])
    out, shares = cast(tuple[Tensor, Tensor], SelectedAttention.apply(q, k, v, sinks, spec))
    return out, shares


class _Spec(NamedTuple):
    """What does not need a gradient; `step` queries make a block."""

    selection: Tensor
    scale: float
    step: int
    keys: int

    def places(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """For the queries in [start, stop): rows of B S [B C k], and which are none, for M k 1."""
        chosen = self.selection[:, start:stop]
        device = chosen.device
        # In the place of none stands the query's own token: no other document is read, not even times zero.
        own = torch.arange(start, stop, device=device).clamp(max=self.keys - 1)[:, None]
        lines = torch.arange(len(chosen), device=device)[:, None, None] * self.keys
        return lines + torch.where(chosen < 0, own, chosen), chosen < 0

    def scores(self, q: Tensor, keys: Tensor, is_none: Tensor) -> Tensor:
        """Masked scores [M k H/G]: keys first, because a product with small transposed keys is slow."""
        scores = torch.bmm(keys, q.mT.contiguous()).mul_(self.scale)
        groups = keys.shape[0] // is_none.shape[:2].numel()
        spread = scores.view(*is_none.shape[:2], groups, *scores.shape[1:])
        spread.masked_fill_(is_none[:, :, None, :, None], float("-inf"))
        return scores


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    # [B S G D] at [B C k] -> [M k D].
    taken = x.flatten(0, 1).index_select(0, places.flatten())
    return taken.view(*places.shape, *x.shape[2:]).transpose(2, 3).flatten(0, 2)


def _add_at(into: Tensor, places: Tensor, grad: Tensor) -> None:
    # The adjoint of _gathered.
    groups = into.shape[2]
    spread = grad.view(places.shape[0], places.shape[1], groups, places.shape[2], -1).transpose(2, 3)
    into.flatten(0, 1).index_add_(0, places.flatten(), spread.flatten(0, 2))


class SelectedAttention(torch.autograd.Function):
    """q [B T H K], k [B S G K], v [B S G V], sinks [H] or None -> outputs [B T H V], shares [B T k]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, spec: _Spec
    ) -> tuple[Tensor, Tensor]:
        """One block of queries after the other."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = (x.to(dtype).contiguous() for x in (q, k, v))
        rows, tokens, heads = q.shape[:3]
        groups, lowest = k.shape[2], torch.finfo(dtype).min
        out = values.new_empty(rows, tokens, heads, v.shape[3])
        lse = values.new_empty(rows, tokens, heads)
        shares = values.new_empty(spec.selection.shape)
        for start in range(0, tokens, spec.step):
            stop = min(start + spec.step, tokens)
            places, is_none = spec.places(start, stop)
            block = queries[:, start:stop].reshape(-1, heads // groups, q.shape[3])
            scores = spec.scores(block, _gathered(keys, places), is_none)
            top = scores.amax(1, keepdim=True).clamp_(min=lowest)
            extras = None
            if sinks is not None:
                extras = sinks.to(dtype).view(1, groups, 1, -1).expand(rows * (stop - start), -1, -1, -1)
                extras = extras.flatten(0, 1)
                top = torch.maximum(top, extras)
            weights = scores.sub_(top).exp_()
            total = weights.sum(1, keepdim=True)
            if extras is not None:
                total = total + (extras - top).exp()
            # Where nothing is chosen everything is zero.
            total = total.clamp_(min=torch.finfo(dtype).tiny)
            weights = weights.div_(total)
            mixed = torch.bmm(weights.mT.contiguous(), _gathered(values, places))
            out[:, start:stop] = mixed.view_as(out[:, start:stop])
            lse[:, start:stop] = (top + total.log()).view_as(lse[:, start:stop])
            shares[:, start:stop] = weights.view(*is_none.shape[:2], groups, -1, heads // groups).sum((2, 4))
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.spec = spec
        ctx.mark_non_differentiable(shares)
        return out.to(v.dtype), shares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and sinks."""
        q, k, v, sinks, out, lse = ctx.saved_tensors
        spec, dtype, heads, groups = ctx.spec, lse.dtype, q.shape[2], k.shape[2]
        grad_out = grads[0].to(dtype).contiguous()
        pull = (grad_out * out).sum(-1)
        grad_sinks = None
        if sinks is not None:
            grad_sinks = -((sinks.to(dtype) - lse).exp() * pull).sum((0, 1)).to(sinks.dtype)
        queries, keys, values = (x.to(dtype).contiguous() for x in (q, k, v))
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (queries, keys, values))
        for start in range(0, q.shape[1], spec.step):
            stop = min(start + spec.step, q.shape[1])
            places, is_none = spec.places(start, stop)
            taken = _gathered(keys, places)
            block_q, block_grad = (
                x[:, start:stop].reshape(-1, heads // groups, x.shape[3]) for x in (queries, grad_out)
            )
            block_lse, block_pull = (x[:, start:stop].reshape(-1, 1, heads // groups) for x in (lse, pull))
            weights = spec.scores(block_q, taken, is_none).sub_(block_lse).exp_()
            _add_at(grad_v, places, torch.bmm(weights, block_grad))
            grad_scores = torch.bmm(_gathered(values, places), block_grad.mT.contiguous())
            grad_scores = grad_scores.sub_(block_pull).mul_(weights).mul_(spec.scale)
            _add_at(grad_k, places, torch.bmm(grad_scores, block_q))
            mixed = torch.bmm(grad_scores.mT.contiguous(), taken)
            grad_q[:, start:stop] = mixed.view_as(grad_q[:, start:stop])
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks, None
