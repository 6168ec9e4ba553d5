"""A mixture of experts: router, routed experts, and a shared expert that every token uses."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.experts import ExpertBiases, ExpertForm, routed_experts
from model.ffn import FeedForward
from model.linear import Initial, Linear
from model.moe.config import MoeConfig
from model.moe.dispatch import Dispatch, Overlapped, local_dispatch
from model.moe.router import Router, Routing


class Experts(nn.Module):
    """Weights of the routed experts; the F gate rows of an expert stand before its F up rows."""

    def __init__(self, config: MoeConfig, width: int, layer: int, stds: tuple[float, float]) -> None:
        super().__init__()
        experts, hidden, activation = config.num_experts, config.hidden, config.activation
        self.form = ExpertForm(
            activation.kind, activation.limit_at(layer), activation.clamps_product, config.scales_input
        )
        self.num_idle = config.num_zero_experts
        # Set from outside where other ranks hold experts too.
        self.dispatch: Dispatch = local_dispatch
        self.gate_up = nn.Parameter(torch.empty(experts, activation.factors * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.initial = {
            name: Initial("normal", 0.0, std, is_decayed=True)
            for name, std in zip(("gate_up", "down"), stds, strict=True)
        }
        self.gate_up_bias = self.down_bias = None
        if config.has_bias:
            self.gate_up_bias = nn.Parameter(torch.empty(experts, activation.factors * hidden))
            self.down_bias = nn.Parameter(torch.empty(experts, width))
            self.initial |= {name: Initial("constant", 0.0) for name in ("gate_up_bias", "down_bias")}

    def forward(
        self,
        x: Float[Tensor, "N D"],
        chosen: Int[Tensor, "N k"],
        weights: Float[Tensor, "N k"],
        overlapped: Overlapped,
    ) -> tuple[Float[Tensor, "N D"], Tensor | None]:
        """Weighted sum of the chosen experts of each token, and what was computed while rows travelled."""
        return self.dispatch(x, chosen, weights, self._run, overlapped)

    def _run(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = self.gate_up.to(x.dtype), self.down.to(x.dtype)
        biases = None
        if self.gate_up_bias is not None and self.down_bias is not None:
            biases = ExpertBiases(self.gate_up_bias.to(x.dtype), self.down_bias.to(x.dtype))
        return routed_experts(x, gate_up, down, chosen, weights, self.form, biases, num_idle=self.num_idle)


class Moe(nn.Module):
    """Routed plus shared experts. No token is dropped.

    Zero experts return their input (LongCat-Flash): a token may choose to spend less.
    """

    def __init__(
        self,
        config: MoeConfig,
        width: int,
        layer: int,
        stds: tuple[float, float],
        vocab_size: int | None = None,
    ) -> None:
        """With `vocab_size` the router hashes token ids."""
        super().__init__()
        self.config = config
        self.router = Router(config, width, stds[0], vocab_size)
        self.experts = Experts(config, width, layer, stds)
        self.shared = self.shared_gate = None
        if config.shared_hidden:
            self.shared = FeedForward(width, config.shared_hidden, config.shared_activation, layer, stds)
        if config.has_shared_gate:
            self.shared_gate = Linear(width, 1, stds[0])

    def forward(
        self, x: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Routing]:
        """The mixed output, and how the tokens were routed."""
        choice = self.router(x, tokens)
        flat, shared_of_x = x.flatten(0, 1), partial(self._shared_of, x)
        out, shared = self.experts(flat, choice.experts, choice.weights, shared_of_x)
        out = out.view_as(x)
        if self.config.num_zero_experts:
            is_zero = choice.experts >= self.config.num_experts
            share = choice.weights.masked_fill(~is_zero, 0.0).sum(-1).to(x.dtype)
            out = out + share.view_as(x[..., 0])[..., None] * x
        return out if shared is None else out + shared, choice.routing

    def _shared_of(self, x: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        shared = self.shared(x)
        return shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid()
