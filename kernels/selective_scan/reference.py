"""Selective scan in plain torch: the recurrence one token at a time, and the chunkwise form.

Letters: B rows, T tokens, D channels, K state dim of a channel, C chunk, N chunks.
Recurrence, arXiv 2312.00752 algorithm 2, for each channel:

    S_t = exp(-step_t rate) S_{t-1} + step_t x_t k_t      y_t = S_t . q_t
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 16


def selective_scan_recurrent(
    x: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    rate: Float[Tensor, "D K"],
    k: Float[Tensor, "B T K"],
    q: Float[Tensor, "B T K"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B D K"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D K"]]:
    """Outputs and final state, by the recurrence in the caller's dtype."""
    state = initial_state
    if state is None:
        state = x.new_zeros(x.shape[0], *rate.shape)
    outputs = []
    for t in range(x.shape[1]):
        if document is not None and t > 0:
            is_same = document[:, t] == document[:, t - 1]
            state = torch.where(is_same[:, None, None], state, torch.zeros_like(state))
        state = state * (-step[:, t, :, None] * rate).exp()
        state = state + (step[:, t] * x[:, t])[..., None] * k[:, t, None]
        outputs.append((state * q[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def selective_scan_chunked(
    x: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    rate: Float[Tensor, "D K"],
    k: Float[Tensor, "B T K"],
    q: Float[Tensor, "B T K"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B D K"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D K"]]:
    """Outputs and final state, all chunks of CHUNK tokens side by side: what training on CPU uses.

    Computes in float32 at least; outputs take x's dtype, the state keeps the precision of the computation.
    """
    length, dtype, out_dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32), x.dtype
    document_mask = _document_mask(document, dtype)
    x, step, k, q = (_tokens_first(part.to(dtype)) for part in (x, step, k, q))
    state = x.new_zeros(x.shape[2], *rate.shape) if initial_state is None else initial_state.to(dtype)
    outputs, final_state = cast(
        tuple[Tensor, Tensor], ChunkedScan.apply(x, step, rate.to(dtype), k, q, state, document_mask)
    )
    return outputs.permute(2, 1, 0, 3).flatten(1, 2)[:, :length].to(out_dtype), final_state


@torch.no_grad()
def initial_state_grad_chunked(
    grad_out: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    rate: Float[Tensor, "D K"],
    q: Float[Tensor, "B T K"],
    *,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B D K"]:
    """Gradient of the initial state, in float32 at least, all chunks side by side."""
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    document_mask, rate = _document_mask(document, dtype), rate.to(dtype)
    grad_out, step, q = (_tokens_first(part.to(dtype)) for part in (grad_out, step, q))
    grad = grad_out.new_zeros(*grad_out.shape[1:], rate.shape[1])
    for c in reversed(range(len(q))):
        grad.addcmul_(grad_out[c][..., None], q[c][..., None, :]).mul_(
            _decay(step[c], rate, document_mask, c)
        )
    chunk_decay = _chunk_decay(step, rate, document_mask)
    total = torch.zeros_like(grad[0])
    for n in reversed(range(len(grad))):
        total = torch.addcmul(grad[n], total, chunk_decay[n])
    return total


def _document_mask(document: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # 0 where a document starts after the first token, else 1, also in the padding.
    if document is None:
        return None
    is_same = torch.nn.functional.pad(document[:, 1:] == document[:, :-1], (1, 0), value=True)
    return 1.0 - _tokens_first(1.0 - is_same.to(dtype)[..., None])


def _tokens_first(x: Tensor) -> Tensor:
    # [B, T, D] -> [C, N, B, D]: the c-th tokens of all chunks are contiguous.
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).permute(2, 1, 0, 3).contiguous()


class ChunkedScan(torch.autograd.Function):
    """The chunkwise form with its own backward, which computes the states again.

    x, step [C N B D], rate [D K], k, q [C N B K], initial_state [B D K], document_mask [C N B 1], 0 where a
    document starts. A first loop over the tokens of a chunk, for all chunks at once, finds what each chunk
    adds to the state; the inter-chunk recurrence then finds the states that enter the chunks, and a second
    loop over the tokens the outputs.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        step: Tensor,
        rate: Tensor,
        k: Tensor,
        q: Tensor,
        initial_state: Tensor,
        document_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [C N B D] and the final state."""
        update = x * step
        added = x.new_zeros(*x.shape[1:], rate.shape[1])
        for c in range(len(x)):
            added = _advance(added, _decay(step[c], rate, document_mask, c), update[c], k[c])
        chunk_decay = _chunk_decay(step, rate, document_mask)
        states, state = torch.empty_like(added), initial_state
        for n in range(len(states)):
            states[n] = state
            state = torch.addcmul(added[n], state, chunk_decay[n])
        outputs, token_states = torch.empty_like(x), states
        for c in range(len(x)):
            token_states = _advance(token_states, _decay(step[c], rate, document_mask, c), update[c], k[c])
            outputs[c] = (token_states @ q[c][..., None])[..., 0]
        ctx.save_for_backward(x, step, rate, k, q, states, document_mask)
        return outputs, state

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, step, rate, k, q and initial_state."""
        x, step, rate, k, q, first, document_mask = ctx.saved_tensors
        grad_out, grad_state = grads
        update = x * step
        decays = x.new_empty(*x.shape, rate.shape[1])
        states = x.new_empty(len(x) + 1, *first.shape)
        states[0] = first
        for c in range(len(x)):
            decays[c] = _decay(step[c], rate, document_mask, c)
            torch.mul(update[c][..., None], k[c][..., None, :], out=states[c + 1])
            states[c + 1].addcmul_(states[c], decays[c])

        # What the outputs of a chunk ask of the state that enters it, then what all later chunks ask.
        grad = torch.zeros_like(first)
        for c in reversed(range(len(x))):
            grad.addcmul_(grad_out[c][..., None], q[c][..., None, :]).mul_(decays[c])
        chunk_decay = _chunk_decay(step, rate, document_mask)
        for n in reversed(range(len(grad))):
            preceding = torch.addcmul(grad[n], grad_state, chunk_decay[n])
            grad[n], grad_state = grad_state, preceding

        grad_q, grad_k, grad_update = torch.empty_like(q), torch.empty_like(k), torch.empty_like(x)
        grad_step, grad_rate = torch.empty_like(step), torch.zeros_like(grad)
        for c in reversed(range(len(x))):
            grad.addcmul_(grad_out[c][..., None], q[c][..., None, :])
            grad_q[c] = (grad_out[c][..., None, :] @ states[c + 1])[..., 0, :]
            grad_k[c] = (update[c][..., None, :] @ grad)[..., 0, :]
            grad_update[c] = (grad @ k[c][..., None])[..., 0]
            grad.mul_(decays[c])
            exponents = grad * states[c]
            grad_step[c] = (exponents * rate).sum(-1)
            grad_rate.addcmul_(exponents, step[c][..., None])
        grad_step = grad_update * x - grad_step
        return grad_update * step, grad_step, -grad_rate.sum((0, 1)), grad_k, grad_q, grad_state, None


def _decay(step: Tensor, rate: Tensor, document_mask: Tensor | None, c: int) -> Tensor:
    decay = (step[..., None] * -rate).exp_()
    return decay if document_mask is None else decay.mul_(document_mask[c][..., None])


def _chunk_decay(step: Tensor, rate: Tensor, document_mask: Tensor | None) -> Tensor:
    # Of a whole chunk.
    chunk_decay = (step.sum(0)[..., None] * -rate).exp_()
    return chunk_decay if document_mask is None else chunk_decay.mul_(document_mask.prod(0)[..., None])


def _advance(state: Tensor, decay: Tensor, update: Tensor, k: Tensor) -> Tensor:
    return decay.mul_(state).addcmul_(update[..., None], k[..., None, :])
