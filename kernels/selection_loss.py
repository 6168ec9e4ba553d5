"""The loss that teaches an indexer to find the keys that attention would have looked at."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def selection_loss(
    scores: Float[Tensor, "*Q n"], mass: Float[Tensor, "*Q n"], is_seen: Bool[Tensor, "*Q n"]
) -> Float[Tensor, ""]:
    """KL(mass / its sum || softmax(scores)), in nats, over what each query sees, summed over queries.

    mass is the attention that fell on each candidate; it gets no gradient. A query that sees nothing, or
    whose attention fell elsewhere, adds zero. In float32 at least.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    target = mass.detach().to(dtype).masked_fill(~is_seen, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    # Finite, so that a query that sees nothing has no NaN to pass on.
    hidden = scores.to(dtype).masked_fill(~is_seen, torch.finfo(dtype).min / 2)
    log_share = hidden.log_softmax(-1).masked_fill(~is_seen, 0.0)
    return (torch.xlogy(target, target) - target * log_share).sum()
