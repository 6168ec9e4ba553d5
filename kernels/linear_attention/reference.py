"""Linear attention in plain torch: the recurrence, and the chunkwise form for decay per head.

Letters: B rows, T tokens, G key heads, H value heads, K key dim, V value dim, C chunk, N chunks.
Recurrence, arXiv 2312.06635 equation 3, with the state laid out as keys by values:

    S_t = diag(a_t) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
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


def linear_attention_recurrent(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
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
        if log_decay is not None:
            factor = log_decay[:, t].exp()
            state = state * (factor[..., None] if factor.ndim == 3 else factor[..., None, None])
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def linear_attention_chunked(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs and final state, in chunks of CHUNK tokens: what training on CPU uses.

    Computes in float32 at least; outputs take v's dtype, the state keeps the precision of the computation.
    """
    rows, length, heads = v.shape[:3]
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    # Padding leaves the state as it is: no decay, no write, and the document of the last token.
    documents = to_document_chunks(document, v, CHUNK)
    log_decay = v.new_zeros(v.shape[:3], dtype=dtype) if log_decay is None else log_decay
    q, k, v = (to_chunks(x.to(dtype), CHUNK) for x in (q, k, v))
    g = chunk_local_cumsum(to_chunks(log_decay[..., None], CHUNK)[..., 0], documents)
    if initial_state is None:
        initial_state = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1])
    outputs, final_state = cast(
        tuple[Tensor, Tensor], ChunkedLinearAttention.apply(q, k, v, g, initial_state.to(dtype), documents)
    )
    return from_chunks(outputs, length).to(out_dtype), final_state


class ChunkedLinearAttention(torch.autograd.Function):
    """The chunkwise form with its own backward.

    q, k [N B G C K], v [N B H C V], g float64 [N B H C], initial_state [B H K V], document [N B C].
    No product has its second factor transposed in place: torch's batched product of small matrices
    then takes three times as long as a copy and a plain product.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, document: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs [N B H C V] and the final state."""
        decay_mask, decay_from_start, decay_to_end = decays_of(g, document, v.dtype)
        heads, state = v.shape[2], initial_state
        scores = per_head(q @ k.mT.contiguous(), heads).mul(decay_mask)
        qg, kg = per_head(q, heads) * decay_from_start, per_head(k, heads) * decay_to_end
        states = kg.mT.contiguous() @ v
        for n in range(v.shape[0]):
            # What the chunk adds is replaced by the state that enters it.
            following = states[n].addcmul(state, decay_from_start[n, :, :, -1:])
            states[n], state = state, following
        outputs = (qg @ states).add_(scores @ v)
        ctx.save_for_backward(q, k, v, decay_mask, decay_from_start, decay_to_end, scores, states)
        return outputs, state

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, g and initial_state."""
        q, k, v, decay_mask, decay_from_start, decay_to_end, scores, states = ctx.saved_tensors
        grad_out, grad_state = grads[0].contiguous(), grads[1]
        q_heads, k_heads = per_head(q, v.shape[2]), per_head(k, v.shape[2])
        qg, kg = q_heads * decay_from_start, k_heads * decay_to_end

        # The inter-chunk recurrence, backwards.
        grad_states = qg.mT.contiguous() @ grad_out
        for n in reversed(range(v.shape[0])):
            preceding = grad_states[n].addcmul(grad_state, decay_from_start[n, :, :, -1:])
            grad_states[n], grad_state = grad_state, preceding

        # The intra-chunk part.
        grad_v = (scores.mT.contiguous() @ grad_out).add_(kg @ grad_states)
        grad_scores = grad_out @ v.mT.contiguous()
        grad_qg = grad_out @ states.mT.contiguous()
        grad_kg = v @ grad_states.mT.contiguous()
        grad_g = None
        if ctx.needs_input_grad[3]:
            # A token's product with itself decays by nothing: left in, it would cancel but for its rounding.
            pairs = grad_scores * scores
            pairs.diagonal(dim1=-2, dim2=-1).zero_()
            through_end = (grad_kg * kg).sum(-1)
            through_end[..., -1] = 0.0
            grad_g = pairs.sum(-1) - pairs.sum(-2) + (grad_qg * qg).sum(-1) - through_end
            ends = (grad_states * states).sum((-1, -2)) * decay_from_start[..., -1, 0]
            grad_g = grad_g.double()
            grad_g[..., -1] += through_end.double().sum(-1) + ends
        grad_scores.mul_(decay_mask)
        grad_q = (grad_scores @ k_heads).addcmul_(grad_qg, decay_from_start)
        grad_k = (grad_scores.mT.contiguous() @ q_heads).addcmul_(grad_kg, decay_to_end)
        grad_q, grad_k = (per_group(x, q.shape[2]) for x in (grad_q, grad_k))
        return grad_q, grad_k, grad_v, grad_g, grad_state, None
