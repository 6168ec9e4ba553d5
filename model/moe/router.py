"""Routers: which experts a token goes to, with what weight, and how evenly."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from model.linear import Initial
from model.moe.config import MoeConfig


class Choice(NamedTuple):
    """The experts of each token, their weights, and what the balance of the layer is judged by."""

    experts: Int[Tensor, "N k"]
    weights: Float[Tensor, "N k"]
    routing: "Routing"


class Routing(NamedTuple):
    """How one layer routed its tokens, for the loss, the bias update and the log.

    balance_loss is summed over the rows of the batch. load counts tokens per expert. entropy, in nats, is
    summed over tokens.
    """

    balance_loss: Float[Tensor, ""]
    load: Float[Tensor, "E"]
    entropy: Float[Tensor, ""]


class Router(nn.Module):
    """Scores tokens against experts in float32 at least and picks the top k.

    `bias` shifts the choice, never the weights; it is state, not a parameter, and moves only by
    `update_bias`.
    """

    # The choice is a comparison of close numbers: bfloat16 logits would flip it.
    needs_full_precision = True

    bias: Float[Tensor, "E"]

    def __init__(self, config: MoeConfig, width: int, init_std: float) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.initial = {"weight": Initial("normal", 0.0, init_std)}
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, x: Float[Tensor, "B T D"]) -> Choice:
        """The choice for all tokens, rows one after the other."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = linear(x.to(dtype), self.weight.to(dtype))
        scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
        ranked = scores.detach() + self.bias.to(dtype)
        experts = ranked.topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.config.has_normalized_weights:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.weight_scale
        return Choice(experts.flatten(0, 1), weights.flatten(0, 1), self._routing(scores, experts))

    def _routing(self, scores: Float[Tensor, "B T E"], experts: Int[Tensor, "B T k"]) -> Routing:
        # Sequence-wise balance, arXiv 2412.19437 equations 17 to 20: it sees one row at a time, so that it is
        # the same however rows are spread over micro-batches and ranks.
        count, k, length = self.config.num_experts, self.config.top_k, scores.shape[1]
        load = scores.new_zeros(scores.shape[0], count)
        load.scatter_add_(1, experts.flatten(1), torch.ones_like(experts.flatten(1), dtype=load.dtype))
        shares = scores / scores.sum(-1, keepdim=True)
        frequency = load * (count / (k * length))
        balance = (frequency * shares.mean(1)).sum() * self.config.balance_loss
        certain = shares.detach().flatten()
        entropy = -torch.dot(certain, certain.clamp(min=torch.finfo(certain.dtype).tiny).log_())
        return Routing(balance, load.sum(0), entropy)

    @torch.no_grad()
    def update_bias(self, load: Float[Tensor, "E"]) -> None:
        """Moves the bias towards experts below the mean load, by one rate each. Mutates `bias`.

        load must be that of the whole global batch. Auxiliary-loss-free balance, arXiv 2408.15664.
        """
        step = (load.mean() - load).sign() * self.config.bias_rate
        self.bias += (step - step.mean()).to(self.bias.dtype)
