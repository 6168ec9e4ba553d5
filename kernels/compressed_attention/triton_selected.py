"""A window of raw keys and selected entries under one softmax: attention to chosen keys of one table of both.

Letters: B rows, T queries, S raw keys, H query heads, K dim of a key, which is its value too, N slots, k
selected entries.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.query_index import q_index_or_arange
from kernels.selected_attention.triton import Tiles, selected_attention_triton, shares_triton


def joint_selected_triton(
    q: Float[Tensor, "B T H K"],
    kv: Float[Tensor, "B S K"],
    entries: Float[Tensor, "B N K"],
    sinks: Float[Tensor, "H"],
    selected: Int[Tensor, "B T k"],
    *,
    position: Int[Tensor, "B T"],
    scale: float,
    window: int,
    q_index: Int[Tensor, "B T"] | None = None,
    is_deterministic: bool,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T k"]]:
    """`kernels.compressed_attention.joint_attention` with a selection."""
    tokens = kv.shape[1]
    table = torch.cat([kv, entries], dim=1)[:, :, None]
    query_index = q_index_or_arange(q_index, q.shape[1], q, torch.int32)
    distance = torch.arange(min(window, tokens), device=q.device, dtype=torch.int32)
    window_keys = torch.where(distance <= position[..., None], query_index[..., None] - distance, -1)
    chosen = selected.to(torch.int32)
    keys = torch.cat([window_keys, torch.where(chosen >= 0, chosen + tokens, -1)], dim=2)
    out, lse = selected_attention_triton(
        q, table, q.shape[3], keys, scale=scale, sinks=sinks, is_deterministic=is_deterministic, tiles=tiles
    )
    return out, shares_triton(q, table, keys, lse, scale=scale, first=window_keys.shape[2], tiles=tiles)
