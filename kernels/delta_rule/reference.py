"""Gated delta rule in plain torch: the recurrence one token at a time, and the chunkwise form.

Letters: B rows, T tokens, G key heads, H value heads, K key dim, V value dim, C chunk, N chunks.
Recurrence, arXiv 2412.06464 equation 10, with the state laid out as keys by values:

    S_t = a_t S_{t-1} + k_t n_t^T      n_t = beta_t (v_t - a_t S_{t-1}^T k_t)      o_t = S_t^T q_t

a_t is a number per head, or diagonal with one per key channel (Kimi Delta Attention, arXiv 2510.26692).

The chunkwise form takes the WY representation and the UT transform of DeltaNet, arXiv 2406.06484, with the
decays of Gated DeltaNet. With g the sums of log decays from the chunk's start, Gamma the decay mask and S the
state that enters the chunk, the values that a chunk writes are

    v_new = u - w S      u = T (beta v)      w = T (beta exp(g) k)      T = (I + A)^-1
    A = beta Gamma k k^T strictly below the diagonal

and then o = exp(g) q S + (Gamma q k^T) v_new, and S becomes exp(g_last) S + (exp(g_last - g) k)^T v_new.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.linear_attention.chunks import (
    chunk_local_cumsum,
    decays_of,
    from_chunks,
    per_group,
    per_head,
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
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs and final state, by the recurrence in the caller's dtype."""
    repeat = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(repeat, dim=2) for x in (q, k))
    state = initial_state
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
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs and final state, in chunks of CHUNK tokens: what training on CPU uses.

    Computes in float32 at least; outputs take v's dtype, the state keeps the precision of the computation.
    The inverse T comes from forward substitution, because a power series of A overflows when keys are alike.
    """
    rows, length, heads = v.shape[:3]
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    # Padding leaves the state as it is: no decay, no write, and the document of the last token.
    documents = to_document_chunks(document, v, CHUNK)
    q, k, v = (to_chunks(x.to(dtype), CHUNK) for x in (q, k, v))
    log_decay, beta = (to_chunks(x[..., None], CHUNK)[..., 0] for x in (log_decay, beta.to(dtype)))
    if initial_state is None:
        initial_state = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1])
    g = chunk_local_cumsum(log_decay, documents)
    outputs, final_state = cast(
        tuple[Tensor, Tensor], ChunkedDeltaRule.apply(q, k, v, g, beta, initial_state.to(dtype), documents)
    )
    return from_chunks(outputs, length).to(out_dtype), final_state


class ChunkedDeltaRule(torch.autograd.Function):
    """The chunkwise form with its own backward.

    q, k [N B G C K], v [N B H C V], g float64 and beta [N B H C], initial_state [B H K V], document [N B C].
    No product has its second factor transposed in place: torch's batched product of small matrices
    then takes three times as long as a copy and a plain product.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        document: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [N B H C V] and the final state."""
        decays = decays_of(g, document, v.dtype)
        decay_mask, decay_from_start, decay_to_end = decays
        heads, scale, state = v.shape[2], beta[..., None], initial_state
        k_transposed = k.mT.contiguous()
        a = per_head(k @ k_transposed, heads).mul(decay_mask).mul_(scale)
        unit = torch.eye(v.shape[3], dtype=v.dtype, device=v.device).expand_as(a)
        inverse = torch.linalg.solve_triangular(a, unit, upper=False, unitriangular=True)
        scores = per_head(q @ k_transposed, heads).mul(decay_mask)
        k_heads = per_head(k, heads)
        u, w = inverse @ (v * scale), inverse @ (k_heads * (scale * decay_from_start))
        qg, kg = per_head(q, heads) * decay_from_start, k_heads * decay_to_end
        v_new, states = torch.empty_like(v), v.new_empty(v.shape[0], *state.shape)
        for n in range(v.shape[0]):
            states[n] = state
            torch.sub(u[n], w[n] @ state, out=v_new[n])
            state = (kg[n].mT @ v_new[n]).addcmul_(state, decay_from_start[n, :, :, -1:])
        outputs = (qg @ states).add_(scores @ v_new)
        ctx.save_for_backward(q, k, v, beta, *decays, inverse, scores, u, w, qg, kg, v_new, states)
        return outputs, state

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, g, beta and initial_state."""
        q, k, v, beta, decay_mask, decay_from_start, decay_to_end, *saved = ctx.saved_tensors
        inverse, scores, u, w, qg, kg, v_new, states = saved
        grad_out, grad_state = grads[0].contiguous(), grads[1]
        heads, scale = v.shape[2], beta[..., None]

        # The inter-chunk recurrence, backwards.
        grad_v_new, grad_read = scores.mT @ grad_out, qg.mT @ grad_out
        grad_states = torch.empty_like(states)
        for n in reversed(range(v.shape[0])):
            grad_states[n] = grad_state
            grad_v_new[n] += kg[n] @ grad_state
            carried = grad_read[n].addcmul_(grad_state, decay_from_start[n, :, :, -1:])
            grad_state = carried - w[n].mT @ grad_v_new[n]

        # The intra-chunk part. Through the inverse: to what it is multiplied with, and to A.
        states_transposed = states.mT.contiguous()
        grad_u = inverse.mT @ grad_v_new
        grad_w = (inverse.mT @ (grad_v_new @ states_transposed)).neg_()
        grad_a = grad_u @ u.mT.contiguous()
        grad_a += grad_w @ w.mT.contiguous()
        grad_a = grad_a.neg_().tril_(-1).mul_(decay_mask)
        grad_scores = grad_out @ v_new.mT.contiguous()
        grad_qg = grad_out @ states_transposed
        grad_kg = v_new @ grad_states.mT.contiguous()

        # To g. `pairs` is the gradient of the decay mask, times the mask: what each difference of two g gets.
        q_heads, k_heads = per_head(q, heads), per_head(k, heads)
        pairs = per_head(k @ k.mT.contiguous(), heads).mul(grad_a)
        through_w = (grad_w * k_heads).sum(-1)
        grad_beta = pairs.sum(-1) + through_w * decay_from_start[..., 0] + (grad_u * v).sum(-1)
        pairs = pairs.mul_(scale).addcmul_(grad_scores, scores)
        through_start = (grad_qg * qg).sum(-1) + through_w * beta * decay_from_start[..., 0]
        through_start[..., -1] += (grad_states * states).sum((-1, -2)) * decay_from_start[..., -1, 0]
        through_end = (grad_kg * kg).sum(-1)
        grad_g = (pairs.sum(-1) - pairs.sum(-2) + through_start - through_end).double()
        grad_g[..., -1] += through_end.double().sum(-1)

        grad_scores.mul_(decay_mask)
        grad_q = (grad_scores @ k_heads).addcmul_(grad_qg, decay_from_start)
        grad_a.mul_(scale)
        grad_k = (grad_a + grad_a.mT) @ k_heads
        grad_k += grad_scores.mT @ q_heads
        grad_k.addcmul_(grad_kg, decay_to_end).addcmul_(grad_w, scale * decay_from_start)
        grad_q, grad_k = (per_group(x, q.shape[2]) for x in (grad_q, grad_k))
        return grad_q, grad_k, grad_u.mul_(scale), grad_g, grad_beta, grad_state, None
