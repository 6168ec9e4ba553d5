"""Softmax attention in plain torch: the direct form, and the fused form that CPU training uses.

Letters: B rows, T queries, S keys, H query heads, G key heads, K key dim, V value dim, W window.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def visible_keys(
    length: int, *, window: int | None, document: Int[Tensor, "B T"] | None, device: torch.device
) -> Bool[Tensor, "R T T"]:
    """Which key each query sees. R is 1 when the rows share one mask, else B."""
    ids = torch.arange(length, device=device)
    distance = ids[:, None] - ids[None, :]
    visible = (distance >= 0)[None]
    if window is not None:
        visible = visible & (distance < window)[None]
    if document is not None:
        visible = visible & (document[:, :, None] == document[:, None, :])
    return visible


def attention_direct(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    scale: float,
    window: int | None = None,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Attention with the scores of all pairs in memory, in the caller's dtype."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    visible = visible_keys(q.shape[1], window=window, document=document, device=q.device)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshv->bthv", weights, v)


def attention_fused(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    scale: float,
    window: int | None = None,
    document: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Attention through torch's fused kernel; memory is linear in T but for the mask."""
    mask = None
    if window is not None or document is not None:
        visible = visible_keys(q.shape[1], window=window, document=document, device=q.device)
        mask = visible[:, None].expand(q.shape[0], 1, -1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
    )
    return out.transpose(1, 2)
