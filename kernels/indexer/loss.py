"""The indexer's loss in plain torch: divergence of the softmax of its scores from the attention's.

Letters: B rows, T queries, S tokens, N index heads, D index dim, P entries, k chosen entries, H heads, G key
heads, C queries of a chunk. The target is detached, so ds = d loss / d score = softmax(score) - target, and
forward can compute all gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.indexer.reference import SCORES, entry_tokens, index_scores, last_tokens, visible_entries
from kernels.query_index import queries_per_chunk


class Target(NamedTuple):
    """For a chunk of queries the attention probability of each entry, and whether a query sees it, [B C P].

    shares: summed over heads, not normalised. entries: indices of the entries [B C P] if each query has its
    own; None if all queries share them.
    """

    shares: Tensor
    visible: Tensor
    entries: Tensor | None


def divergence(
    scores: Float[Tensor, "B C P"], shares: Float[Tensor, "B C P"], visible: Bool[Tensor, "B C P"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "B C P"]]:
    """Sum of KL(shares / sum(shares) || softmax(scores)) over queries, and its gradient by the scores."""
    shares = shares.masked_fill(~visible, 0.0)
    total = shares.sum(-1, keepdim=True)
    is_counted = total > 0
    target = shares / torch.where(is_counted, total, 1.0)
    # The softmax over nothing would be NaN.
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(~is_counted, 0.0)
    log_chosen = scores.log_softmax(-1)
    terms = torch.where(target > 0, target * (target.clamp(min=1e-300).log() - log_chosen), 0.0)
    grad = torch.where(is_counted, log_chosen.exp() - target, 0.0)
    return terms.sum(), grad


def index_loss_direct(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    shares: Float[Tensor, "B T P"],
    visible: Bool[Tensor, "B T P"],
) -> Float[Tensor, ""]:
    """The loss with all scores in memory, in the caller's dtype, for autograd to differentiate."""
    shares = shares.detach().masked_fill(~visible, 0.0)
    total = shares.sum(-1, keepdim=True)
    is_counted = (total > 0)[..., 0]
    target = (shares / total)[is_counted]
    scores = index_scores(q, k, weights).masked_fill(~visible, float("-inf"))[is_counted]
    log_chosen = torch.where(visible[is_counted], scores.log_softmax(-1), 0.0)
    return (torch.special.xlogy(target, target) - target * log_chosen).sum()


def index_loss_full(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    attention_q: Float[Tensor, "B T H K"],
    attention_k: Float[Tensor, "B S G K"],
    lse: Float[Tensor, "B T H"],
    *,
    scale: float,
    last: Int[Tensor, "B P"] | None,
    size: int,
    document: Int[Tensor, "B S"] | None,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """The loss over all entries, a chunk of queries at a time; attention is computed again from lse."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads, (rows, length, groups, _) = attention_q.shape[2], attention_k.shape
    keys = attention_k.detach().to(dtype).permute(0, 2, 3, 1).flatten(0, 1).contiguous()
    queries = attention_q.detach().to(dtype).unflatten(2, (groups, -1)).transpose(1, 2).contiguous()
    sums = lse.detach().to(dtype).unflatten(2, (groups, -1)).transpose(1, 2).contiguous()
    lasts = last_tokens(k, last)
    row_lasts = torch.arange(length, device=q.device).expand(rows, -1)

    def target(start: int, stop: int) -> Target:
        scores = torch.bmm(queries[:, :, start:stop].flatten(2, 3).flatten(0, 1), keys).mul_(scale)
        scores.sub_(sums[:, :, start:stop].reshape(rows * groups, -1, 1))
        is_key = visible_entries(start, stop, row_lasts, document, q_index)
        # [B G C R S]: masked before exp, since lse does not cover keys that a query does not see.
        spread = scores.view(rows, groups, stop - start, -1, length)
        shares = spread.masked_fill_(~is_key[:, None, :, None], float("-inf")).exp_().sum((1, 3))
        if size > 1:
            members = entry_tokens(lasts, size).flatten(1)[:, None].expand(-1, stop - start, -1)
            shares = shares.gather(2, members).unflatten(2, (-1, size)).sum(3)
        return Target(shares, visible_entries(start, stop, lasts, document, q_index), None)

    step = queries_per_chunk(q, rows * max(q.shape[2] * k.shape[1], heads * length), SCORES)
    return cast(Tensor, IndexLoss.apply(q, k, weights, target, step))


def index_loss_selected(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    entries: Int[Tensor, "B T k"],
    shares: Float[Tensor, "B T k"],
) -> Float[Tensor, ""]:
    """The loss over each query's own entries, a chunk of queries at a time."""
    dtype = torch.promote_types(q.dtype, torch.float32)

    def target(start: int, stop: int) -> Target:
        own = entries[:, start:stop]
        return Target(shares[:, start:stop].detach().to(dtype), own >= 0, own.clamp(min=0))

    numbers = q.shape[0] * entries.shape[2] * (q.shape[2] + q.shape[3])
    step = queries_per_chunk(q, numbers, SCORES)
    return cast(Tensor, IndexLoss.apply(q, k, weights, target, step))


class IndexLoss(torch.autograd.Function):
    """q [B T N D], k [B P D], weights [B T N] -> the loss; `target` gives the target of a chunk."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, weights: Tensor, target: Callable[[int, int], Target], step: int
    ) -> Tensor:
        """The loss and all gradients, one chunk of queries after the other."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        ctx.dtypes = [x.dtype for x in (q, k, weights)]
        q, k, weights = (x.to(dtype).contiguous() for x in (q, k, weights))
        grads = [torch.zeros_like(x) for x in (q, k, weights)]
        loss = q.new_zeros(())
        for start in range(0, q.shape[1], step):
            block = slice(start, min(start + step, q.shape[1]))
            goal = target(block.start, block.stop)
            products = _products(q[:, block], k, goal.entries).relu_()
            scores = torch.einsum("bcn,bcnp->bcp", weights[:, block], products)
            part, grad = divergence(scores, goal.shares, goal.visible)
            loss += part
            grads[2][:, block] = torch.einsum("bcp,bcnp->bcn", grad, products)
            grad_products = (grad[:, :, None] * weights[:, block, :, None]).mul_(products > 0)
            _into(grads[0][:, block], grads[1], grad_products, q[:, block], k, goal.entries)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward computed, times that of the loss."""
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((x * grads[0]).to(dtype) for x, dtype in found), None, None


def _taken(k: Tensor, entries: Tensor) -> Tensor:
    # [B P D] at [B C k] -> [B C k D].
    row_offsets = torch.arange(k.shape[0], device=k.device)[:, None, None] * k.shape[1]
    return k.flatten(0, 1).index_select(0, (row_offsets + entries).flatten()).view(*entries.shape, -1)


def _products(q: Tensor, k: Tensor, entries: Tensor | None) -> Tensor:
    # [B C N P]: q_n k of each index head and entry.
    if entries is None:
        return torch.bmm(q.flatten(1, 2), k.mT.contiguous()).unflatten(1, (-1, q.shape[2]))
    keys = _taken(k, entries).flatten(0, 1)
    products = torch.bmm(keys, q.flatten(0, 1).mT.contiguous()).mT.contiguous()
    return products.unflatten(0, (q.shape[0], -1))


def _into(dq: Tensor, dk: Tensor, dproducts: Tensor, q: Tensor, k: Tensor, entries: Tensor | None) -> None:
    """Adds the gradients of the products [B C N P] to those of q [B C N D] and k [B P D]."""
    if entries is None:
        rows = dproducts.flatten(1, 2)
        dq += torch.bmm(rows, k).view_as(dq)
        dk += torch.bmm(rows.mT, q.flatten(1, 2))
        return
    rows = dproducts.flatten(0, 1)
    dq += torch.bmm(rows, _taken(k, entries).flatten(0, 1)).view_as(dq)
    row_offsets = torch.arange(k.shape[0], device=k.device)[:, None, None] * k.shape[1]
    dk_rows = torch.bmm(rows.mT.contiguous(), q.flatten(0, 1)).flatten(0, 1)
    dk.flatten(0, 1).index_add_(0, (row_offsets + entries).flatten(), dk_rows)
