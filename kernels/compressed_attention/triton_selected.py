"""A window of raw keys joined with selected entries: attention over chosen keys of one table of both.

Letters: B rows, T queries, S raw keys, H query heads, K dim of a key, which is its value too, N slots, k
selected entries.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.places import query_tokens
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
    places: Int[Tensor, "B T"] | None = None,
    is_deterministic: bool,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T k"]]:
    """`kernels.compressed_attention.joint_attention` with a selection."""
    tokens = kv.shape[1]
    table = torch.cat([kv, entries], dim=1)[:, :, None]
    token = query_tokens(places, q.shape[1], q, torch.int32)
    back = torch.arange(min(window, tokens), device=q.device, dtype=torch.int32)
    near = torch.where(back <= position[..., None], token[..., None] - back, -1)
    chosen = selected.to(torch.int32)
    keys = torch.cat([near, torch.where(chosen >= 0, chosen + tokens, -1)], dim=2)
    out, lse = selected_attention_triton(
        q, table, q.shape[3], keys, scale=scale, sinks=sinks, is_deterministic=is_deterministic, tiles=tiles
    )
    return out, shares_triton(q, table, keys, lse, scale=scale, first=near.shape[2], tiles=tiles)
