"""Gated delta rule in plain torch: the recurrence one token at a time, and the chunked form.

Letters: B rows, T tokens, G key heads, H value heads, K key dim, V value dim, C chunk, N chunks.
Recurrence, arXiv 2412.06464 equation 10, with the state laid out as keys by values:

    S_t = a_t S_{t-1} + k_t u_t^T      u_t = beta_t (v_t - a_t S_{t-1}^T k_t)      o_t = S_t^T q_t

a_t is a number per head, or diagonal with one per key channel (Kimi Delta Attention, arXiv 2510.26692).
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.linear_attention.chunks import (
    decays_of,
    from_chunks,
    per_group,
    per_head,
    running_decay,
    to_chunks,
    to_document_chunks,
)

CHUNK = 32


def gated_delta_rule_recurrent(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs and final state, by the recurrence in the caller's dtype."""
    repeat = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(repeat, dim=2) for x in (q, k))
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1])
    outputs = []
    for t in range(v.shape[1]):
        if document is not None and t > 0:
            is_same = document[:, t] == document[:, t - 1]
            state = torch.where(is_same[:, None, None, None], state, torch.zeros_like(state))
        factor = log_decay[:, t].exp()
        state = state * (factor[..., None] if factor.ndim == 3 else factor[..., None, None])
        recalled = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        update = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + k[:, t, :, :, None] * update[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def gated_delta_rule_chunked(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs and final state, in chunks of CHUNK tokens: the form that training on CPU uses.

    Computes in float32 at least; outputs take v's dtype, the state keeps the precision of the computation.
    Inside a chunk the updates solve (I + A) U = beta V with A strictly lower triangular; the inverse comes
    from forward substitution, because a power series of A overflows when keys are alike.
    """
    rows, length, heads = v.shape[:3]
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    # Padding leaves the state as it is: no decay, no write, and the document of the last token.
    documents = to_document_chunks(document, v, CHUNK)
    q, k, v = (to_chunks(x.to(dtype), CHUNK) for x in (q, k, v))
    log_decay, beta = (to_chunks(x[..., None], CHUNK)[..., 0] for x in (log_decay, beta.to(dtype)))
    start = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1]) if state is None else state.to(dtype)
    running = running_decay(log_decay, documents)
    outputs, end = cast(
        tuple[Tensor, Tensor], ChunkedDeltaRule.apply(q, k, v, running, beta, start, documents)
    )
    return from_chunks(outputs, length).to(out_dtype), end


class ChunkedDeltaRule(torch.autograd.Function):
    """The chunked form with its own backward.

    q, k [N B G C K], v [N B H C V], running float64 and beta [N B H C], state [B H K V], document [N B C].
    No product has its second factor transposed in place: the library's batched product of small matrices
    then takes three times as long as a copy and a plain product.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, running: Tensor, beta: Tensor, state: Tensor, document: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs [N B H C V] and the final state."""
        decays = decays_of(running, document, v.dtype)
        between, from_start, to_end = decays
        heads, scale = v.shape[2], beta[..., None]
        k_turned = k.mT.contiguous()
        system = per_head(k @ k_turned, heads).mul(between).mul_(scale)
        unit = torch.eye(v.shape[3], dtype=v.dtype, device=v.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True)
        scores = per_head(q @ k_turned, heads).mul(between)
        k_heads = per_head(k, heads)
        written, erased = inverse @ (v * scale), inverse @ (k_heads * (scale * from_start))
        q_decayed, k_decayed = per_head(q, heads) * from_start, k_heads * to_end
        updates, states = torch.empty_like(v), v.new_empty(v.shape[0], *state.shape)
        for n in range(v.shape[0]):
            states[n] = state
            torch.sub(written[n], erased[n] @ state, out=updates[n])
            state = (k_decayed[n].mT @ updates[n]).addcmul_(state, from_start[n, :, :, -1:])
        outputs = (q_decayed @ states).add_(scores @ updates)
        ctx.save_for_backward(
            q, k, v, beta, *decays, inverse, scores, written, erased, q_decayed, k_decayed, updates, states
        )
        return outputs, state

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, running, beta and state."""
        q, k, v, beta, between, from_start, to_end, inverse, scores, *rest = ctx.saved_tensors
        written, erased, q_decayed, k_decayed, updates, states = rest
        grad_out, grad_state = grads[0].contiguous(), grads[1]
        heads, scale = v.shape[2], beta[..., None]

        # Backwards through the states, chunk by chunk.
        grad_updates, into_state = scores.mT @ grad_out, q_decayed.mT @ grad_out
        grad_states = torch.empty_like(states)
        for n in reversed(range(v.shape[0])):
            grad_states[n] = grad_state
            grad_updates[n] += k_decayed[n] @ grad_state
            carried = into_state[n].addcmul_(grad_state, from_start[n, :, :, -1:])
            grad_state = carried - erased[n].mT @ grad_updates[n]

        # What is left is local to each chunk. Through the solve: to its two right sides and to its system.
        states_turned = states.mT.contiguous()
        grad_written = inverse.mT @ grad_updates
        grad_erased = (inverse.mT @ (grad_updates @ states_turned)).neg_()
        grad_system = grad_written @ written.mT.contiguous()
        grad_system += grad_erased @ erased.mT.contiguous()
        grad_system = grad_system.neg_().tril_(-1).mul_(between)
        grad_scores = grad_out @ updates.mT.contiguous()
        grad_q_decayed = grad_out @ states_turned
        grad_k_decayed = updates @ grad_states.mT.contiguous()

        # To the gates. `pairs` is d between, times between: what each pair of running decays gets.
        q_heads, k_heads = per_head(q, heads), per_head(k, heads)
        pairs = per_head(k @ k.mT.contiguous(), heads).mul(grad_system)
        through_k = (grad_erased * k_heads).sum(-1)
        grad_beta = pairs.sum(-1) + through_k * from_start[..., 0] + (grad_written * v).sum(-1)
        pairs = pairs.mul_(scale).addcmul_(grad_scores, scores)
        through_start = (grad_q_decayed * q_decayed).sum(-1) + through_k * beta * from_start[..., 0]
        through_start[..., -1] += (grad_states * states).sum((-1, -2)) * from_start[..., -1, 0]
        through_end = (grad_k_decayed * k_decayed).sum(-1)
        grad_running = (pairs.sum(-1) - pairs.sum(-2) + through_start - through_end).double()
        grad_running[..., -1] += through_end.double().sum(-1)

        grad_scores.mul_(between)
        grad_q = (grad_scores @ k_heads).addcmul_(grad_q_decayed, from_start)
        grad_system.mul_(scale)
        grad_k = (grad_system + grad_system.mT) @ k_heads
        grad_k += grad_scores.mT @ q_heads
        grad_k.addcmul_(grad_k_decayed, to_end).addcmul_(grad_erased, scale * from_start)
        grad_q, grad_k = (per_group(x, q.shape[2]) for x in (grad_q, grad_k))
        return grad_q, grad_k, grad_written.mul_(scale), grad_running, grad_beta, grad_state, None
