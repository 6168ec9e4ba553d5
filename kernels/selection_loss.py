"""The loss that trains an indexer to score keys or blocks as attention weighs them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def selection_loss(
    scores: Float[Tensor, "*Q n"], mass: Float[Tensor, "*Q n"], is_seen: Bool[Tensor, "*Q n"]
) -> Float[Tensor, ""]:
    """KL(mass / sum(mass) || softmax(scores)) over the n candidates that each query sees, in nats, summed.

    mass: attention probability of each candidate, >= 0, without gradient. A query that sees no candidate, or
    whose candidates have no mass, adds zero. In float32 at least.
    DeepSeek-V3.2, arXiv 2512.02556, equation 4.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    target = mass.detach().to(dtype).masked_fill(~is_seen, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    # Finite, so that a query that sees nothing has no NaN to pass on.
    hidden = scores.to(dtype).masked_fill(~is_seen, torch.finfo(dtype).min / 2)
    log_share = hidden.log_softmax(-1).masked_fill(~is_seen, 0.0)
    return (torch.xlogy(target, target) - target * log_share).sum()
