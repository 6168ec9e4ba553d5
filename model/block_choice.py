"""The choice of blocks by the attention to their entries, where ranks share the query heads of a key head.

Letters: B rows, T queries, H query heads here, G key heads, K key dim, N slots of entries, n chosen blocks.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.compressed_attention import Choice, entry_importance, select_by_entries
from kernels.document_windows import Windows
from kernels.query_index import at_queries, q_index_or_arange, queries_per_chunk
from model.sequence_sharding import AttentionView
from model.tensor_shards import HeadShards

# Numbers of attention to blocks that a chunk of queries may hold: bounds memory, not the result.
CHUNK_ELEMENTS = 1 << 24


@torch.no_grad()
def select_across_shards(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    view: AttentionView,
    head_shards: HeadShards,
    *,
    entries: Windows,
    blocks: Windows,
    scale: float,
    choice: Choice,
) -> Int[Tensor, "B T G n"]:
    """`select_by_entries` over all query heads of a key head, on this rank and on those that replicate it.

    Equations 9 and 10 of Native Sparse Attention, arXiv 2502.11089: a group of heads makes one choice.
    """
    options: dict[str, Any] = {
        "entries": entries,
        "blocks": blocks,
        "position": view.position,
        "scale": scale,
    }
    if head_shards.kv_replicas == 1:
        return select_by_entries(q, k, **options, **choice, q_index=view.q_index)
    rows, tokens = q.shape[:2]
    token = q_index_or_arange(view.q_index, tokens, q).expand(rows, -1)
    position = at_queries(view.position, view.q_index)
    size = queries_per_chunk(q, rows * k.shape[2] * blocks.start.shape[1], CHUNK_ELEMENTS)
    chosen = []
    for start in range(0, tokens, size):
        own = slice(start, start + size)
        scores = entry_importance(q[:, own], k, **options, q_index=token[:, own])
        scores = head_shards.sum_kv_replicas(scores)
        chosen.append(blocks.choose(scores, position[:, own], token[:, own], **choice))
    return torch.cat(chosen, dim=1)
