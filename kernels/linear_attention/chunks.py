"""What the chunkwise forms share: the cut into chunks, and decays per head that stop at document starts.

Letters: B rows, T tokens, G key heads, H value heads, C chunk, N chunks. Chunks come first, so that one
chunk, or a slab of them, is contiguous.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Decays(NamedTuple):
    """Decay factors in a chunk, zero across documents; g are the sums of `chunk_local_cumsum`.

    decay_mask [N B H C C]: exp(g_i - g_j), from token j to token i, zero for j after i (the matrix Gamma of
    Gated DeltaNet, L of Mamba-2). decay_from_start [N B H C 1]: exp(g_i), of the state that enters the chunk
    until token i. decay_to_end [N B H C 1]: exp(g_last - g_i), of what token i writes until the chunk ends.
    """

    decay_mask: Tensor
    decay_from_start: Tensor
    decay_to_end: Tensor


def to_chunks(x: Float[Tensor, "B T H D"], size: int) -> Float[Tensor, "N B H C D"]:
    """x cut into chunks of `size` tokens, with zeros behind the last token."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).contiguous()


def from_chunks(x: Float[Tensor, "N B H C D"], length: int) -> Float[Tensor, "B T H D"]:
    """The first `length` tokens of what `to_chunks` cut."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def to_document_chunks(
    document: Int[Tensor, "B T"] | None, x: Float[Tensor, "B T *rest"], size: int
) -> Int[Tensor, "N B C"]:
    """Document numbers of the chunks of x; padding is of the document of the last token."""
    if document is None:
        document = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    pad = -document.shape[1] % size
    document = torch.cat([document, document[:, -1:].expand(-1, pad)], dim=1)
    return document.unflatten(1, (-1, size)).transpose(0, 1).contiguous()


def starts_document(document: Int[Tensor, "N B C"]) -> Bool[Tensor, "N B C"]:
    """Whether a token is the first of its document; the first of all goes on from an earlier state."""
    before = document.roll(1, dims=2)
    before[1:, :, 0], before[0, :, 0] = document[:-1, :, -1], document[0, :, 0]
    return document != before


def chunk_local_cumsum(
    log_decay: Float[Tensor, "N B H C"], document: Int[Tensor, "N B C"]
) -> Float[Tensor, "N B H C"]:
    """g: sums of log decays from the start of the chunk, or of the document in it, in float64."""
    # Differences of a float32 cumulative sum lose digits after a strong decay; float64 keeps them, and below
    # the floor exp is exactly zero in either dtype. The sum is a product with the mask of the documents: one
    # over the whole chunk would carry the rounding of one document into the next.
    same = document[..., :, None] == document[..., None, :]
    gates = log_decay.double().clamp(min=-1000.0).mT
    return (same.tril().double() @ gates).mT


def decays_of(g: Float[Tensor, "N B H C"], document: Int[Tensor, "N B C"], dtype: torch.dtype) -> Decays:
    """The decay factors that follow from `chunk_local_cumsum`."""
    same = (document[..., :, None] == document[..., None, :]).tril()[:, :, None]
    before = torch.cat([document[:1, :, :1], document[:-1, :, -1:]])
    is_first, is_last = (document == before)[:, :, None], (document == document[..., -1:])[:, :, None]
    # Masked before exp: above the diagonal the difference is positive and would overflow.
    difference = (g[..., :, None] - g[..., None, :]).to(dtype)
    decay_mask = difference.masked_fill_(~same, float("-inf")).exp_()
    decay_from_start = g.to(dtype).exp() * is_first
    decay_to_end = (g[..., -1:] - g).to(dtype).masked_fill(~is_last, float("-inf")).exp()
    return Decays(decay_mask, decay_from_start[..., None], decay_to_end[..., None])


def per_head(x: Float[Tensor, "N B G C D"], heads: int) -> Float[Tensor, "N B H C D"]:
    """x repeated for the value heads of each key head; x itself when there are as many."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def per_group(x: Float[Tensor, "N B H C D"], groups: int) -> Float[Tensor, "N B G C D"]:
    """The sum over the value heads of each key head."""
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)
