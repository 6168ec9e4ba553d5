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
    Inside a chunk the updates solve (I + A) U = beta V with A strictly lower triangular; the solve is
    forward substitution, because a power series of A overflows when keys are alike.
    """
    rows, length, heads = v.shape[:3]
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    pad = -length % CHUNK
    if document is None:
        document = torch.zeros(rows, length, dtype=torch.long, device=v.device)
    # Padding leaves the state as it is: no decay, no write, and the document of the last token.
    document = torch.cat([document, document[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (-1, CHUNK))
    q, k, v = (_chunks(x.to(dtype), pad) for x in (q, k, v))
    log_decay, beta = (_chunks(x[..., None], pad)[..., 0] for x in (log_decay, beta.to(dtype)))
    start = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1]) if state is None else state.to(dtype)
    running = _running_decay(log_decay, document)
    outputs, end = cast(
        tuple[Tensor, Tensor], ChunkedDeltaRule.apply(q, k, v, running, beta, start, document)
    )
    return outputs.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length].to(out_dtype), end


def _chunks(x: Tensor, pad: int) -> Tensor:
    # [B, T, H, D] -> [B, H, N, C, D]
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad))
    return x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4).contiguous()


def _running_decay(log_decay: Tensor, document: Tensor) -> Tensor:
    """Sum of the log decays from the start of the chunk, or of the document in it; float64 [B H N C]."""
    # Differences of a float32 running sum lose digits after a strong decay; float64 keeps them, and below
    # the floor exp is exactly zero in either dtype. The sum is a product with the mask of the documents: one
    # over the whole chunk would carry the rounding of one document into the next.
    same = document[..., :, None] == document[..., None, :]
    gates = log_decay.double().clamp(min=-1000.0).permute(0, 2, 3, 1)
    return (same.tril().double() @ gates).permute(0, 3, 1, 2)


class _Decays(NamedTuple):
    """Decay factors of a chunk, zero across documents.

    between [B H N C C]: from j to i, j at most i. from_start, to_end [B H N C]: of the state that enters the
    chunk until i, and of the write of i until the chunk ends.
    """

    between: Tensor
    from_start: Tensor
    to_end: Tensor


def _decays(running: Tensor, document: Tensor, dtype: torch.dtype) -> _Decays:
    same = (document[..., :, None] == document[..., None, :]).tril()[:, None]
    before = torch.cat([document[:, :1, :1], document[:, :-1, -1:]], dim=1)
    carried, kept = (document == before)[:, None], (document == document[..., -1:])[:, None]
    # Masked before exp: above the diagonal the difference is positive and would overflow.
    difference = (running[..., :, None] - running[..., None, :]).to(dtype)
    between = difference.masked_fill_(~same, float("-inf")).exp_()
    from_start = running.to(dtype).exp() * carried
    to_end = (running[..., -1:] - running).to(dtype).masked_fill(~kept, float("-inf")).exp()
    return _Decays(between, from_start, to_end)


class ChunkedDeltaRule(torch.autograd.Function):
    """The chunked form with its own backward, which keeps no square of a chunk in memory.

    q, k [B G N C K], v [B H N C V], running float64 and beta [B H N C], state [B H K V], document [B N C].
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, running: Tensor, beta: Tensor, state: Tensor, document: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B H N C V] and the final state."""
        between, from_start, to_end = _decays(running, document, v.dtype)
        heads = v.shape[1]
        system = _per_head(k @ k.mT, heads).mul(between).mul_(beta[..., None])
        scores = _per_head(q @ k.mT, heads).mul(between)
        k_heads = _per_head(k, heads)
        right = torch.cat([beta[..., None] * v, (beta * from_start)[..., None] * k_heads], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        written, erased = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        q_decayed = _per_head(q, heads) * from_start[..., None]
        k_decayed = (k_heads * to_end[..., None]).mT
        updates, states = torch.empty_like(v), state.new_empty(*v.shape[:3], *state.shape[2:])
        for n in range(v.shape[2]):
            states[:, :, n] = state
            update = written[:, :, n] - erased[:, :, n] @ state
            updates[:, :, n] = update
            state = state * from_start[:, :, n, -1, None, None] + k_decayed[:, :, n] @ update
        outputs = q_decayed @ states + scores @ updates
        ctx.save_for_backward(q, k, v, running, beta, document, solved, updates, states)
        return outputs, state

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, running, beta and state."""
        q, k, v, running, beta, document, solved, updates, states = ctx.saved_tensors
        grad_out, grad_state = grads
        between, from_start, to_end = _decays(running, document, v.dtype)
        heads, groups = v.shape[1], q.shape[1]
        erased = solved[..., v.shape[-1] :]
        products = _per_head(k @ k.mT, heads)
        scores = _per_head(q @ k.mT, heads)
        q_heads, k_heads = _per_head(q, heads), _per_head(k, heads)

        # Backwards through the states, chunk by chunk.
        grad_updates = (scores * between).mT @ grad_out
        into_state = (q_heads * from_start[..., None]).mT @ grad_out
        k_decayed = k_heads * to_end[..., None]
        grad_states = torch.empty_like(states)
        for n in reversed(range(v.shape[2])):
            grad_states[:, :, n] = grad_state
            grad_updates[:, :, n] += k_decayed[:, :, n] @ grad_state
            last = from_start[:, :, n, -1, None, None]
            grad_state = last * grad_state + into_state[:, :, n] - erased[:, :, n].mT @ grad_updates[:, :, n]

        # What is left is local to each chunk.
        grad_q_decayed = grad_out @ states.mT
        grad_k_decayed = updates @ grad_states.mT
        grad_scores = grad_out @ updates.mT
        grad_solved = torch.cat([grad_updates, -(grad_updates @ states.mT)], dim=-1)
        system = products.mul(between).mul_(beta[..., None])
        grad_right = torch.linalg.solve_triangular(system.mT, grad_solved, upper=True, unitriangular=True)
        grad_v, grad_k_right = grad_right.split([v.shape[-1], k.shape[-1]], dim=-1)
        # d between, times between: what each pair of running decays gets. The diagonal of A is not there.
        grad_system = (grad_right @ solved.mT).neg_().tril_(-1).mul_(between)
        grad_scores.mul_(between)
        pairs = grad_system * products
        grad_beta = pairs.sum(-1)
        pairs.mul_(beta[..., None]).addcmul_(grad_scores, scores)

        through_k = (grad_k_right * k_heads).sum(-1)
        grad_from_start = (grad_q_decayed * q_heads).sum(-1) + through_k * beta
        grad_from_start[..., -1] += (grad_states * states).sum((-1, -2))
        grad_to_end = (grad_k_decayed * k_heads).sum(-1) * to_end
        grad_running = (pairs.sum(-1) - pairs.sum(-2) + grad_from_start * from_start - grad_to_end).double()
        grad_running[..., -1] += grad_to_end.double().sum(-1)
        grad_beta += through_k * from_start + (grad_v * v).sum(-1)

        grad_q = _per_group(grad_q_decayed * from_start[..., None] + grad_scores @ k_heads, groups)
        symmetric = grad_system.mul_(beta[..., None])
        symmetric = symmetric + symmetric.mT
        grad_k = symmetric @ k_heads + grad_scores.mT @ q_heads
        grad_k.addcmul_(grad_k_decayed, to_end[..., None])
        grad_k.addcmul_(grad_k_right, (beta * from_start)[..., None])
        grad_k = _per_group(grad_k, groups)
        return grad_q, grad_k, grad_v * beta[..., None], grad_running, grad_beta, grad_state, None


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _per_group(x: Tensor, groups: int) -> Tensor:
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)
