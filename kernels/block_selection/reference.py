"""Block selection in plain torch: one query at a time, and by chunks of queries.

Letters: B rows, T queries, S keys, H query heads, G key heads, J selecting heads, K key dim, C tokens of a
block, N slots of blocks, n selected blocks, m = n + 1, Q queries of a chunk.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.document_windows import Windows, document_windows
from kernels.query_index import QueryChunk, at_queries, q_index_or_arange, queries_per_chunk, query_chunks

# Elements of the scores that a chunk of queries may hold: bounds memory, not the result.
CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def select_by_mean_direct(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    *,
    block: int,
    count: int,
    position: Int[Tensor, "B T"],
) -> Int[Tensor, "B T H n"]:
    """The selection, one query at a time, in the caller's dtype."""
    rows, tokens, heads, _ = q.shape
    chosen = torch.full((rows, tokens, heads, min(count, tokens // block)), -1, device=q.device)
    for b, t, h in _queries(rows, tokens, heads):
        own = t - int(position[b, t]) % block
        starts = range(t - int(position[b, t]), own, block)
        head = h // (heads // k.shape[2])
        scores = [float(q[b, t, h] @ k[b, s : s + block, head].mean(0)) for s in starts]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        for rank, i in enumerate(best):
            chosen[b, t, h, rank] = starts[i] // block
    return chosen


@torch.no_grad()
def select_by_max_direct(
    q: Float[Tensor, "B T J K"],
    k: Float[Tensor, "B T 1 K"],
    *,
    block: int,
    count: int,
    local: int,
    position: Int[Tensor, "B T"],
) -> tuple[Int[Tensor, "B T J n"], Int[Tensor, "B T J m"]]:
    """The selection and its best keys, one query at a time, in the caller's dtype."""
    rows, tokens, heads, _ = q.shape
    width = min(count, tokens // block)
    chosen = torch.full((rows, tokens, heads, width), -1, device=q.device)
    best_keys = torch.zeros(rows, tokens, heads, width + 1, dtype=torch.long, device=q.device)
    for b, t, h in _queries(rows, tokens, heads):
        scores = [float(q[b, t, h] @ k[b, s, 0]) for s in range(t + 1)]
        own = t - int(position[b, t]) % block
        starts = list(range(t - int(position[b, t]), own, block))
        best = [max(range(s, s + block), key=lambda i: scores[i]) for s in starts]
        order = sorted(
            range(len(starts)), key=lambda i: (-float(starts[i] >= own - local * block), -scores[best[i]])
        )
        best_keys[b, t, h, 0] = max(range(own, t + 1), key=lambda i: scores[i])
        for rank, i in enumerate(order[:count]):
            chosen[b, t, h, rank], best_keys[b, t, h, rank + 1] = starts[i] // block, best[i]
    return chosen, best_keys


def _queries(rows: int, tokens: int, heads: int) -> list[tuple[int, int, int]]:
    return [(b, t, h) for b in range(rows) for t in range(tokens) for h in range(heads)]


@torch.no_grad()
def select_by_mean_chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    *,
    block: int,
    count: int,
    position: Int[Tensor, "B S"],
    q_index: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T H n"]:
    """The selection, a chunk of queries at a time; means and scores in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    windows = document_windows(position, block, block)
    means = windows.gather(k.to(dtype)).mean(2)
    token, position = q_index_or_arange(q_index, q.shape[1], q), at_queries(position, q_index)
    chosen = []
    for a, b, *_ in _chunks(q, windows.start.shape[1], None):
        grouped = q[:, a:b].to(dtype).unflatten(2, (k.shape[2], -1))
        scores = torch.einsum("bqgrk,bngk->bqgrn", grouped, means).flatten(2, 3)
        chosen.append(windows.choose(scores, position[:, a:b], token[:, a:b], count=count))
    return torch.cat(chosen, dim=1)


@torch.no_grad()
def select_by_max_chunked(
    q: Float[Tensor, "B T J K"],
    k: Float[Tensor, "B S 1 K"],
    *,
    block: int,
    count: int,
    local: int,
    position: Int[Tensor, "B S"],
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Int[Tensor, "B T J n"], Int[Tensor, "B T J m"]]:
    """The selection and its best keys, a chunk of queries at a time; scores in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k[:, :, 0].to(dtype)
    windows = document_windows(position, block, block)
    in_blocks = windows.gather(k).flatten(1, 2)
    token, position = q_index_or_arange(q_index, q.shape[1], q), at_queries(position, q_index)
    chosen, best_keys = [], []
    for chunk in _chunks(q, k.shape[1], q_index):
        a, b = chunk.start, chunk.stop
        scores = torch.einsum("bqjk,bsk->bqjs", q[:, a:b], in_blocks)
        best, best_in_block = scores.unflatten(-1, (windows.start.shape[1], block)).max(-1)
        slots = windows.choose(best, position[:, a:b], token[:, a:b], count=count, local=local)
        chosen.append(slots)
        own = _own_best_key(q[:, a:b], k, position[:, a:b] % block, token[:, a:b], chunk, block)
        best_keys.append(torch.cat([own, _best_keys(windows, best_in_block, slots)], -1))
    return torch.cat(chosen, dim=1), torch.cat(best_keys, dim=1)


def _own_best_key(
    q: Tensor, k: Tensor, block_offset: Tensor, token: Tensor, chunk: QueryChunk, block: int
) -> Tensor:
    first = max(0, chunk.key_start - block + 1)
    key = torch.arange(first, chunk.key_stop, device=q.device)
    query = token[..., None]
    is_own = (key <= query) & (key >= query - block_offset[..., None])
    scores = torch.einsum("bqjk,bsk->bqjs", q, k[:, first : chunk.key_stop])
    return scores.masked_fill(~is_own[:, :, None], float("-inf")).argmax(-1, keepdim=True) + first


def _best_keys(windows: Windows, best_in_block: Tensor, slots: Tensor) -> Tensor:
    if slots.shape[-1] == 0:
        return slots
    slots = slots.clamp(min=0)
    start = windows.start[:, None, None].expand(-1, *best_in_block.shape[1:3], -1)
    return start.gather(-1, slots) + best_in_block.gather(-1, slots)


def _chunks(q: Tensor, keys: int, q_index: Tensor | None) -> list[QueryChunk]:
    rows, tokens, heads, _ = q.shape
    return query_chunks(q_index, tokens, queries_per_chunk(q, rows * heads * keys, CHUNK_ELEMENTS))
