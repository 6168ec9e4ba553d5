"""Selective scan in plain torch: the recurrence one token at a time, and the chunked form.

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
    state: Float[Tensor, "B D K"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D K"]]:
    """Outputs and final state, by the recurrence in the caller's dtype."""
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
    state: Float[Tensor, "B D K"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D K"]]:
    """Outputs and final state, all chunks of CHUNK tokens side by side: the form that training on CPU uses.

    Computes in float32 at least; outputs take x's dtype, the state keeps the precision of the computation.
    """
    length, dtype, out_dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32), x.dtype
    goes_on = _goes_on(document, dtype)
    x, step, k, q = (_places_first(part.to(dtype)) for part in (x, step, k, q))
    start = x.new_zeros(x.shape[2], *rate.shape) if state is None else state.to(dtype)
    outputs, end = cast(
        tuple[Tensor, Tensor], ChunkedScan.apply(x, step, rate.to(dtype), k, q, start, goes_on)
    )
    return outputs.permute(2, 1, 0, 3).flatten(1, 2)[:, :length].to(out_dtype), end


@torch.no_grad()
def start_gradient_chunked(
    grad_out: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    rate: Float[Tensor, "D K"],
    q: Float[Tensor, "B T K"],
    *,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B D K"]:
    """Gradient of the state before the tokens, in float32 at least, all chunks side by side."""
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    goes_on, rate = _goes_on(document, dtype), rate.to(dtype)
    grad_out, step, q = (_places_first(part.to(dtype)) for part in (grad_out, step, q))
    grad = grad_out.new_zeros(*grad_out.shape[1:], rate.shape[1])
    for c in reversed(range(len(q))):
        grad.addcmul_(grad_out[c][..., None], q[c][..., None, :]).mul_(_factor(step[c], rate, goes_on, c))
    kept = _kept(step, rate, goes_on)
    total = torch.zeros_like(grad[0])
    for n in reversed(range(len(grad))):
        total = torch.addcmul(grad[n], total, kept[n])
    return total


def _goes_on(document: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # 0 where a document starts after the first token, else 1; padding goes on with a factor of 1.
    if document is None:
        return None
    is_same = torch.nn.functional.pad(document[:, 1:] == document[:, :-1], (1, 0), value=True)
    return 1.0 - _places_first(1.0 - is_same.to(dtype)[..., None])


def _places_first(x: Tensor) -> Tensor:
    # [B, T, D] -> [C, N, B, D]: one place of all chunks is contiguous.
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).permute(2, 1, 0, 3).contiguous()


class ChunkedScan(torch.autograd.Function):
    """The chunked form with its own backward, which computes the states anew.

    x, step [C N B D], rate [D K], k, q [C N B K], state [B D K], goes_on [C N B 1], 0 at starts of documents.
    The first walk through the places of all chunks finds what each chunk adds, a walk through the chunks the
    states that enter them, and a second walk through the places the outputs.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        step: Tensor,
        rate: Tensor,
        k: Tensor,
        q: Tensor,
        state: Tensor,
        goes_on: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [C N B D] and the final state."""
        written = x * step
        added = x.new_zeros(*x.shape[1:], rate.shape[1])
        for c in range(len(x)):
            added = _advance(added, _factor(step[c], rate, goes_on, c), written[c], k[c])
        kept = _kept(step, rate, goes_on)
        states = torch.empty_like(added)
        for n in range(len(states)):
            states[n] = state
            state = torch.addcmul(added[n], state, kept[n])
        outputs, walking = torch.empty_like(x), states
        for c in range(len(x)):
            walking = _advance(walking, _factor(step[c], rate, goes_on, c), written[c], k[c])
            outputs[c] = (walking @ q[c][..., None])[..., 0]
        ctx.save_for_backward(x, step, rate, k, q, states, goes_on)
        return outputs, state

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, step, rate, k, q and state."""
        x, step, rate, k, q, first, goes_on = ctx.saved_tensors
        grad_out, grad_state = grads
        written = x * step
        factors = x.new_empty(*x.shape, rate.shape[1])
        states = x.new_empty(len(x) + 1, *first.shape)
        states[0] = first
        for c in range(len(x)):
            factors[c] = _factor(step[c], rate, goes_on, c)
            torch.mul(written[c][..., None], k[c][..., None, :], out=states[c + 1])
            states[c + 1].addcmul_(states[c], factors[c])

        # What the outputs of a chunk ask of the state that enters it, then what all later chunks ask.
        grad = torch.zeros_like(first)
        for c in reversed(range(len(x))):
            grad.addcmul_(grad_out[c][..., None], q[c][..., None, :]).mul_(factors[c])
        kept = _kept(step, rate, goes_on)
        for n in reversed(range(len(grad))):
            preceding = torch.addcmul(grad[n], grad_state, kept[n])
            grad[n], grad_state = grad_state, preceding

        grad_q, grad_k, grad_written = torch.empty_like(q), torch.empty_like(k), torch.empty_like(x)
        grad_step, grad_rate = torch.empty_like(step), torch.zeros_like(grad)
        for c in reversed(range(len(x))):
            grad.addcmul_(grad_out[c][..., None], q[c][..., None, :])
            grad_q[c] = (grad_out[c][..., None, :] @ states[c + 1])[..., 0, :]
            grad_k[c] = (written[c][..., None, :] @ grad)[..., 0, :]
            grad_written[c] = (grad @ k[c][..., None])[..., 0]
            grad.mul_(factors[c])
            exponents = grad * states[c]
            grad_step[c] = (exponents * rate).sum(-1)
            grad_rate.addcmul_(exponents, step[c][..., None])
        grad_step = grad_written * x - grad_step
        return grad_written * step, grad_step, -grad_rate.sum((0, 1)), grad_k, grad_q, grad_state, None


def _factor(step: Tensor, rate: Tensor, goes_on: Tensor | None, place: int) -> Tensor:
    factor = (step[..., None] * -rate).exp_()
    return factor if goes_on is None else factor.mul_(goes_on[place][..., None])


def _kept(step: Tensor, rate: Tensor, goes_on: Tensor | None) -> Tensor:
    # The factor of a whole chunk.
    kept = (step.sum(0)[..., None] * -rate).exp_()
    return kept if goes_on is None else kept.mul_(goes_on.prod(0)[..., None])


def _advance(state: Tensor, factor: Tensor, written: Tensor, k: Tensor) -> Tensor:
    return factor.mul_(state).addcmul_(written[..., None], k[..., None, :])
