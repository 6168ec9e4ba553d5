"""What a chunk of the gated delta rule does to the state that enters it."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked
from kernels.delta_rule import gated_delta_rule


class DeltaSummary(NamedTuple):
    """final state = transition @ initial state + added; outputs = those from a zero state + reads @ state."""

    transition: Float[Tensor, "B H K K"]
    added: Float[Tensor, "B H K V"]
    reads: Float[Tensor, "B T H K"]


@checked
@torch.no_grad()
def delta_rule_summary(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    *,
    document: Int[Tensor, "B T"] | None = None,
) -> DeltaSummary:
    """The affine map of the state over all tokens, and what each token reads of the initial state.

    One pass of `gated_delta_rule` on K + V value columns, the first K of them without values and from the
    identity. Where a document starts after the first token, transition is zero, and so are reads from there
    on. No gradients. Transition and added are in float32 at least, reads in v's dtype.

    Raises ValueError as `gated_delta_rule`.
    """
    rows, heads, key_dim, value_dim = v.shape[0], v.shape[2], k.shape[3], v.shape[3]
    wide = torch.nn.functional.pad(v, (key_dim, 0))
    initial_state = v.new_zeros(
        rows, heads, key_dim, key_dim + value_dim, dtype=torch.promote_types(v.dtype, torch.float32)
    )
    initial_state.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    out, final_state = gated_delta_rule(
        q, k, wide, log_decay, beta, document=document, initial_state=initial_state
    )
    return DeltaSummary(
        final_state[..., :key_dim], final_state[..., key_dim:], out[..., :key_dim].contiguous()
    )


@checked
def delta_rule_initial_state_grad(
    grad_out: Float[Tensor, "B T H V"], reads: Float[Tensor, "B T H K"]
) -> Float[Tensor, "B H K V"]:
    """Gradient of the initial state from outputs alone: none of the final state."""
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    return torch.einsum("bthk,bthv->bhkv", reads.to(dtype), grad_out.to(dtype))
