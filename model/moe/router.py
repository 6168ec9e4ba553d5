"""Routers: which experts a token goes to, with what weight, and how evenly."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from model.linear import Initial, wide_linear
from model.moe.config import MoeConfig


class Choice(NamedTuple):
    """The experts of each token, their weights, and what the balance of the layer is judged by."""

    experts: Int[Tensor, "N k"]
    weights: Float[Tensor, "N k"]
    routing: "Routing"


class Routing(NamedTuple):
    """How one layer routed its tokens, for the loss, the bias update and the log.

    balance_loss and z_loss are summed over tokens, coefficients included. load counts tokens per expert,
    zero experts last. entropy, in nats, is summed over tokens.
    """

    balance_loss: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    load: Float[Tensor, "E"]
    entropy: Float[Tensor, ""]


class Sums(NamedTuple):
    """Sums over the tokens of a layer: per row load and shares of each expert, over all z_loss and entropy.

    tokens is the length of a row.
    """

    load: Float[Tensor, "B E"]
    shares: Float[Tensor, "B E"]
    z_loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    tokens: int


class Router(nn.Module):
    """Scores tokens against experts in float32 at least and picks the top k.

    `bias` shifts the choice, never the weights; it is state, not a parameter, and moves only by
    `update_bias`. With `vocab_size` the choice is a table by token id instead (DeepSeek-V4's first layers).
    """

    # The choice is a comparison of close numbers: bfloat16 logits would flip it.
    needs_full_precision = True
    fusible = ("_rank", "_weigh")

    bias: Float[Tensor, "E"]
    table: Int[Tensor, "V k"]

    def __init__(self, config: MoeConfig, width: int, init_std: float, vocab_size: int | None = None) -> None:
        super().__init__()
        self.config, choices = config, config.num_choices
        self.weight = nn.Parameter(torch.empty(choices, width))
        self.initial = {"weight": Initial("normal", 0.0, init_std, is_decayed=True)}
        self.logit_bias = nn.Parameter(torch.empty(choices)) if config.has_router_bias else None
        if config.has_router_bias:
            self.initial["logit_bias"] = Initial("constant", 0.0)
        self.is_hashed = vocab_size is not None
        if vocab_size is None:
            self.register_buffer("bias", torch.zeros(choices))
        else:
            self.register_buffer("table", torch.zeros(vocab_size, config.top_k, dtype=torch.long))
            self.reset_buffers()
        # The load of the whole global batch from that of this rank; set from outside where there are ranks.
        self.sum_load: Callable[[Tensor], Tensor] = _as_is
        # The load of whole rows, where ranks hold parts of a row: how many, and their sum.
        self.row_parts = 1
        self.sum_row_load: Callable[[Tensor], Tensor] = _as_is
        # What becomes of a choice; set from outside while the same tokens pass once more.
        self.replay_routing: Callable[[Tensor], Tensor] = _as_is

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Gives bias or table its first value. Mutates it."""
        if self.is_hashed:
            self.table.copy_(hash_table(self.table, self.config.num_experts))
        else:
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"]) -> Choice:
        """The choice for all tokens, rows one after the other."""
        logits, scores, experts = self._rank(x, tokens)
        experts = experts if self.is_hashed else self.replay_routing(experts)
        weights, sums = self._weigh(logits, scores, experts)
        return Choice(experts.flatten(0, 1), weights.flatten(0, 1), self._routing(sums))

    def _rank(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and scores [B T E], and the experts [B T k] of each token."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.logit_bias is None else self.logit_bias.to(dtype)
        logits = wide_linear(x, self.weight.to(dtype))
        logits = logits if bias is None else logits + bias
        scores = scores_of(logits, self.config)
        return logits, scores, self.table[tokens] if self.is_hashed else self._top(scores, logits)

    def _weigh(self, logits: Tensor, scores: Tensor, experts: Tensor) -> tuple[Tensor, "Sums"]:
        """Weights [B T k] of the chosen experts, and what the balance is judged by."""
        config = self.config
        if config.score == "softmax_of_chosen":
            weights = logits.gather(-1, experts).softmax(-1)
        else:
            weights = scores.gather(-1, experts)
            if config.has_normalized_weights:
                weights = weights / (weights.sum(-1, keepdim=True) + config.weight_eps)
        load = scores.new_zeros(scores.shape[0], config.num_choices)
        load.scatter_add_(1, experts.flatten(1), torch.ones_like(experts.flatten(1), dtype=load.dtype))
        # A token that no expert wants has scores of zero, and then shares of zero.
        shares = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        z_loss = scores.new_zeros(())
        if config.z_loss:
            z_loss = logits.logsumexp(-1).square().sum() * config.z_loss
        certain = shares.detach().flatten()
        entropy = -torch.dot(certain, certain.clamp(min=torch.finfo(certain.dtype).tiny).log_())
        sums = Sums(load, shares.sum(1), z_loss, entropy, scores.shape[1])
        return weights * config.weight_scale, sums

    def _top(self, scores: Tensor, logits: Tensor) -> Int[Tensor, "B T k"]:
        config = self.config
        ranked = (logits if config.score == "softmax_of_chosen" else scores).detach()
        ranked = ranked + self.bias.to(ranked.dtype)
        if config.num_groups > 1:
            groups = ranked.unflatten(-1, (config.num_groups, -1))
            best = groups.topk(2 if config.group_score == "top2" else 1, dim=-1).values.sum(-1)
            kept = best.topk(config.kept_groups, dim=-1).indices
            is_kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
            ranked = groups.masked_fill(~is_kept[..., None], float("-inf")).flatten(-2)
        return ranked.topk(config.top_k, dim=-1).indices

    def _routing(self, sums: "Sums") -> Routing:
        config, load, shares, length = self.config, sums.load, sums.shares, sums.tokens
        count, k = config.num_choices, config.top_k
        # Experts, times how often each is chosen, times its mean share: DeepSeek-V3's loss, arXiv 2412.19437
        # equations 17 to 20. A row at a time it is the same however rows are spread over micro-batches and
        # ranks; over the global batch, if the load is summed over it; over the local batch it is not.
        if config.balance_scope == "sequence":
            seen, length = self.sum_row_load(load), length * self.row_parts
            balance = (seen * (count / (k * length)) * shares).sum()
        else:
            seen = load.sum(0)
            seen = self.sum_load(seen) if config.balance_scope == "global" else seen
            balance = (seen * (count / seen.sum()) * shares.sum(0)).sum()
        return Routing(balance * config.balance_loss, sums.z_loss, load.sum(0), sums.entropy)

    @torch.no_grad()
    def update_bias(self, load: Float[Tensor, "E"]) -> None:
        """Moves the bias towards experts below the mean load, by one rate each. Mutates `bias`.

        load must be that of the whole global batch. Auxiliary-loss-free balance, arXiv 2408.15664.
        """
        if self.is_hashed:
            return
        step = (load.mean() - load).sign() * self.config.bias_rate
        self.bias += (step - step.mean()).to(self.bias.dtype)


def scores_of(logits: Float[Tensor, "*N E"], config: MoeConfig) -> Float[Tensor, "*N E"]:
    """How much each expert is wanted, at least zero."""
    if config.score == "sigmoid":
        return logits.sigmoid()
    if config.score == "sqrt_softplus":
        # The root of zero has no gradient.
        return softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    return logits.softmax(-1)


def hash_table(like: Int[Tensor, "V k"], experts: int) -> Int[Tensor, "V k"]:
    """For each token id k different experts, spread evenly; the same on every machine."""
    vocab_size, k = like.shape
    ids = torch.arange(vocab_size, device=like.device)
    # Neighbouring ids are alike, so they are spread by the golden ratio; the k experts of an id lie apart.
    first = (ids * 2654435761) % 4294967296 % experts
    return (first[:, None] + torch.arange(k, device=like.device) * (experts // k)) % experts


def _as_is(x: Tensor) -> Tensor:
    return x
