"""A mixture of experts: router, routed experts, and a shared expert that every token uses."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.experts import routed_experts
from model.ffn import SwiGlu
from model.linear import Initial, Linear
from model.moe.config import MoeConfig
from model.moe.router import Router, Routing


class Experts(nn.Module):
    """Weights of the routed experts; the F gate rows of an expert stand before its F up rows."""

    def __init__(self, config: MoeConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * config.hidden, width))
        self.down = nn.Parameter(torch.empty(config.num_experts, width, config.hidden))
        self.initial = {
            "gate_up": Initial("normal", 0.0, init_std),
            "down": Initial("normal", 0.0, out_std),
        }

    def forward(
        self, x: Float[Tensor, "N D"], chosen: Tensor, weights: Float[Tensor, "N k"]
    ) -> Float[Tensor, "N D"]:
        """Weighted sum of the chosen experts of each token."""
        return routed_experts(x, self.gate_up.to(x.dtype), self.down.to(x.dtype), chosen, weights)


class Moe(nn.Module):
    """Routed plus shared experts. No token is dropped."""

    def __init__(self, config: MoeConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.router = Router(config, width, init_std)
        self.experts = Experts(config, width, init_std, out_std)
        self.shared = SwiGlu(width, config.shared_hidden, init_std, out_std) if config.shared_hidden else None
        self.shared_gate = Linear(width, 1, init_std) if config.has_shared_gate else None

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Routing]:
        """The mixed output, and how the tokens were routed."""
        choice = self.router(x)
        out = self.experts(x.flatten(0, 1), choice.experts, choice.weights).view_as(x)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = shared * self.shared_gate(x).sigmoid()
            out = out + shared
        return out, choice.routing
