"""Gated delta rule in plain torch: the recurrence one token at a time, and the chunked form.

Letters: B rows, T tokens, G key heads, H value heads, K key dim, V value dim, C chunk, N chunks.
Recurrence, arXiv 2412.06464 equation 10, with the state laid out as keys by values:

    S_t = a_t S_{t-1} + k_t u_t^T      u_t = beta_t (v_t - a_t S_{t-1}^T k_t)      o_t = S_t^T q_t
"""

from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 32


def gated_delta_rule_recurrent(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"],
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
        state = state * log_decay[:, t].exp()[..., None, None]
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
    pad = -length % CHUNK
    if document is None:
        document = torch.zeros(rows, length, dtype=torch.long, device=v.device)
    # Padding leaves the state as it is: no decay, no write, and the document of the last token.
    document = torch.cat([document, document[:, -1:].expand(-1, pad)], dim=1)
    document = document.unflatten(1, (-1, CHUNK)).transpose(0, 1).contiguous()
    q, k, v = (_chunks(x.to(dtype), pad) for x in (q, k, v))
    log_decay, beta = (_chunks(x[..., None], pad)[..., 0] for x in (log_decay, beta.to(dtype)))
    start = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1]) if state is None else state.to(dtype)
    running = _running_decay(log_decay, document)
    outputs, end = cast(
        tuple[Tensor, Tensor], ChunkedDeltaRule.apply(q, k, v, running, beta, start, document)
    )
    return outputs.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length].to(out_dtype), end


def _chunks(x: Tensor, pad: int) -> Tensor:
    # [B, T, H, D] -> [N, B, H, C, D]: chunks first, so that one chunk, or a slab of them, is contiguous.
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad))
    return x.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4).contiguous()


def _running_decay(log_decay: Tensor, document: Tensor) -> Tensor:
    """Sum of the log decays from the start of the chunk, or of the document in it; float64 [N B H C]."""
    # Differences of a float32 running sum lose digits after a strong decay; float64 keeps them, and below
    # the floor exp is exactly zero in either dtype. The sum is a product with the mask of the documents: one
    # over the whole chunk would carry the rounding of one document into the next.
    same = document[..., :, None] == document[..., None, :]
    gates = log_decay.double().clamp(min=-1000.0).mT
    return (same.tril().double() @ gates).mT


class _Decays(NamedTuple):
    """Decay factors of a chunk, zero across documents.

    between [N B H C C]: from j to i, j at most i. from_start, to_end [N B H C 1]: of the state that enters
    the chunk until i, and of the write of i until the chunk ends.
    """

    between: Tensor
    from_start: Tensor
    to_end: Tensor


def _decays(running: Tensor, document: Tensor, dtype: torch.dtype) -> _Decays:
    same = (document[..., :, None] == document[..., None, :]).tril()[:, :, None]
    before = torch.cat([document[:1, :, :1], document[:-1, :, -1:]])
    carried, kept = (document == before)[:, :, None], (document == document[..., -1:])[:, :, None]
    # Masked before exp: above the diagonal the difference is positive and would overflow.
    difference = (running[..., :, None] - running[..., None, :]).to(dtype)
    between = difference.masked_fill_(~same, float("-inf")).exp_()
    from_start = running.to(dtype).exp() * carried
    to_end = (running[..., -1:] - running).to(dtype).masked_fill(~kept, float("-inf")).exp()
    return _Decays(between, from_start[..., None], to_end[..., None])


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
        decays = _decays(running, document, v.dtype)
        between, from_start, to_end = decays
        heads, scale = v.shape[2], beta[..., None]
        k_turned = k.mT.contiguous()
        system = _per_head(k @ k_turned, heads).mul(between).mul_(scale)
        unit = torch.eye(v.shape[3], dtype=v.dtype, device=v.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True)
        scores = _per_head(q @ k_turned, heads).mul(between)
        k_heads = _per_head(k, heads)
        written, erased = inverse @ (v * scale), inverse @ (k_heads * (scale * from_start))
        q_decayed, k_decayed = _per_head(q, heads) * from_start, k_heads * to_end
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
        q_heads, k_heads = _per_head(q, heads), _per_head(k, heads)
        pairs = _per_head(k @ k.mT.contiguous(), heads).mul(grad_system)
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
        grad_q, grad_k = (_per_group(x, q.shape[2]) for x in (grad_q, grad_k))
        return grad_q, grad_k, grad_written.mul_(scale), grad_running, grad_beta, grad_state, None


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _per_group(x: Tensor, groups: int) -> Tensor:
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)
