"""Inputs of the gated delta rule from projections: queries, keys, values, betas, and the decay per head."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from kernels.norm import unit_norm
from model.linear import Initial


class Decay(nn.Module):
    """Log decay per head, -exp(A_log) softplus(x + dt_bias), in float32 at least."""

    # In bfloat16 a rate near 1 would round the memory length by percents.
    needs_full_precision = True
    fusible = ("forward",)

    def __init__(self, heads: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        # Rates of 1 to 16 and steps of dt_min to dt_max spread the memory over 1 to 1000 tokens.
        self.initial = {
            "A_log": Initial("log_of_uniform", 1.0, 16.0, is_float32=True),
            "dt_bias": Initial("inverse_softplus_of_log_uniform", dt_min, dt_max, is_float32=True),
        }

    def forward(self, x: Float[Tensor, "B T H"]) -> Float[Tensor, "B T H"]:
        """At most zero."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = self.A_log.to(dtype).exp()
        return -rate * softplus(x.to(dtype) + self.dt_bias.to(dtype))


def delta_rule_inputs(
    mixed: Float[Tensor, "B T X"],
    beta: Float[Tensor, "B T H"],
    parts: tuple[int, ...],
    key_dim: int,
    value_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys [B T G K] of unit length, values [B T H V], and betas between 0 and 1."""
    q, k, v = mixed.split(parts, dim=-1)
    q, k = (part.unflatten(-1, (-1, key_dim)) for part in (q, k))
    return unit_norm(q, factor=key_dim**-0.5), unit_norm(k), v.unflatten(-1, (-1, value_dim)), beta.sigmoid()
