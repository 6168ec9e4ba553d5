"""Decay per key channel in plain torch: the products of all pairs in a chunk, and the chunkwise form on them.

Letters: B rows, T tokens, G key heads, H value heads, K key dim, V value dim, C chunk, N chunks, R kinds of
rows.
The factor between tokens j and i is the product of the factors after j up to i. It is neither a difference of
running sums nor a quotient: a block of 2h tokens takes, for every token of its right half, the product from
the middle on, and for every token of its left half the product up to the middle. Each is at most one, so that
no decay is too strong, and a factor of zero cuts documents apart exactly.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.linear_attention.chunks import (
    from_chunks,
    per_head,
    starts_document,
    to_chunks,
    to_document_chunks,
)

CHUNK = 32


def linear_attention_by_channel(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs and final state, in chunks of CHUNK tokens: what training on CPU uses.

    Computes in float32 at least; outputs take v's dtype, the state keeps the precision of the computation.
    """
    rows, length, heads = v.shape[:3]
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    factor = channel_factors(log_decay.to(dtype), document, CHUNK)
    q, k = (per_head(to_chunks(x.to(dtype), CHUNK), heads) for x in (q, k))
    v = to_chunks(v.to(dtype), CHUNK)
    scores, decay_from_start, decay_to_end = pair_products(q[..., None, :], k, factor)
    scores = scores[..., 0, :] + (q * k).sum(-1).diag_embed()
    added = (k * decay_to_end).mT.contiguous() @ v
    chunk_decay = decay_from_start[..., -1, :, None]
    state = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1])
    state = state if initial_state is None else initial_state.to(dtype)
    states = []
    for own, decay in zip(added.unbind(), chunk_decay.unbind(), strict=True):
        states.append(state)
        state = torch.addcmul(own, state, decay)
    outputs = (q * decay_from_start) @ torch.stack(states) + scores @ v
    return from_chunks(outputs, length).to(out_dtype), state


def channel_factors(
    log_decay: Float[Tensor, "B T H K"], document: Int[Tensor, "B T"] | None, size: int
) -> Float[Tensor, "N B H C K"]:
    """Decay factors in chunks of `size`, 0 where a document starts and 1 in the padding."""
    factor = to_chunks(log_decay, size).exp()
    if document is None:
        return factor
    is_start = starts_document(to_document_chunks(document, log_decay, size))
    return factor.masked_fill(is_start[:, :, None, :, None], 0.0)


def pair_products(
    rows: Float[Tensor, "N B H C R K"], k: Float[Tensor, "N B H C K"], factor: Float[Tensor, "N B H C K"]
) -> tuple[Float[Tensor, "N B H C R C"], Float[Tensor, "N B H C K"], Float[Tensor, "N B H C K"]]:
    """Products of each row with the decayed keys before its token, and the factors to the chunk's ends.

    The product of a row of token i with key j, j below i, is the sum over K of row, key, and the factors
    after j up to i. The second result is the product of the factors from the chunk's start up to and with a
    token, the third that after a token until the chunk's end. C is a power of two.
    """
    return cast(tuple[Tensor, Tensor, Tensor], PairProducts.apply(rows, k, factor))


class PairProducts(torch.autograd.Function):
    """`pair_products` with its own backward; block sizes double, and backward walks them down again."""

    @staticmethod
    def forward(ctx, rows: Tensor, k: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes as `pair_products`."""
        ctx.save_for_backward(rows, k, factor)
        products = rows.new_zeros(*rows.shape[:-1], rows.shape[-3])
        levels, ends = _levels(factor)
        for prefix, suffix in levels:
            half = prefix.shape[-2]
            later = rows.unflatten(3, (-1, 2, half))[..., 1, :, :, :] * prefix[..., 1, :, None, :]
            earlier = k.unflatten(3, (-1, 2, half))[..., 0, :, :] * suffix[..., 0, :, :]
            block = later.flatten(-3, -2) @ earlier.mT.contiguous()
            _blocks(products, half).copy_(block.view(*later.shape[:-1], half))
        return products, *ends

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of rows, k and factor."""
        rows, k, factor = ctx.saved_tensors
        grad_products, grad_prefix, grad_suffix = grads[0], grads[1].clone(), grads[2].clone()
        grad_rows, grad_k = torch.zeros_like(rows), torch.zeros_like(k)
        for prefix, suffix in reversed(_levels(factor)[0]):
            half = prefix.shape[-2]
            through_prefix = grad_prefix.unflatten(3, (-1, 2, half))
            through_suffix = grad_suffix.unflatten(3, (-1, 2, half))
            _halve(through_prefix, through_suffix, prefix, suffix)
            rows_later = rows.unflatten(3, (-1, 2, half))[..., 1, :, :, :]
            k_earlier = k.unflatten(3, (-1, 2, half))[..., 0, :, :]
            later, earlier = prefix[..., 1, :, None, :], suffix[..., 0, :, :]
            grad = _blocks(grad_products, half).flatten(-3, -2)
            grad_later = (grad @ (k_earlier * earlier)).view(rows_later.shape)
            grad_earlier = grad.mT.contiguous() @ (rows_later * later).flatten(-3, -2)
            grad_rows.unflatten(3, (-1, 2, half))[..., 1, :, :, :].addcmul_(grad_later, later)
            grad_k.unflatten(3, (-1, 2, half))[..., 0, :, :].addcmul_(grad_earlier, earlier)
            through_prefix[..., 1, :, :].add_((grad_later * rows_later).sum(-2))
            through_suffix[..., 0, :, :].addcmul_(grad_earlier, k_earlier)
        return grad_rows, grad_k, grad_prefix


def _levels(factor: Tensor) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    # Products up to and with a token from the start of its block, and after it to the end of its block, for
    # blocks of 1, 2, 4, ... tokens, each [N B H C/2h 2 h K]; and those of the whole chunk, [N B H C K].
    levels = []
    prefix, suffix, half = factor, torch.ones_like(factor), 1
    while half < factor.shape[3]:
        prefix, suffix = (x.unflatten(3, (-1, 2, half)) for x in (prefix, suffix))
        levels.append((prefix, suffix))
        first, second = prefix[..., 0, -1:, :], prefix[..., 1, -1:, :]
        prefix = torch.stack([prefix[..., 0, :, :], prefix[..., 1, :, :] * first], dim=-3).flatten(3, 5)
        suffix = torch.stack([suffix[..., 0, :, :] * second, suffix[..., 1, :, :]], dim=-3).flatten(3, 5)
        half *= 2
    return levels, (prefix, suffix)


def _halve(grad_prefix: Tensor, grad_suffix: Tensor, prefix: Tensor, suffix: Tensor) -> None:
    # Gradients of the products of a block become those of its halves, in place.
    first, second = prefix[..., 0, -1, :], prefix[..., 1, -1, :]
    grad_first = (grad_prefix[..., 1, :, :] * prefix[..., 1, :, :]).sum(-2)
    grad_second = (grad_suffix[..., 0, :, :] * suffix[..., 0, :, :]).sum(-2)
    grad_prefix[..., 1, :, :].mul_(first[..., None, :])
    grad_suffix[..., 0, :, :].mul_(second[..., None, :])
    grad_prefix[..., 0, -1, :].add_(grad_first)
    grad_prefix[..., 1, -1, :].add_(grad_second)


def _blocks(products: Tensor, half: int) -> Tensor:
    # The view [N B H C/2h h R h] on the rows of right halves and the columns of the left halves before them.
    blocks = products.unflatten(5, (-1, 2, half)).unflatten(3, (-1, 2, half))
    return blocks[..., 1, :, :, :, 0, :].diagonal(dim1=3, dim2=6).movedim(-1, 3)
