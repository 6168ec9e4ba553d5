"""The best key of every block in Triton: one program takes a tile of queries and a block.

Letters: B rows, T queries, S keys, J selecting heads, K key dim, C tokens of a block, N slots of blocks, n
selected blocks, m = n + 1. x_row, x_token, x_head: strides of x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.document_windows import document_windows
from kernels.query_index import at_queries, q_index_or_arange

# Best scores that a chunk of queries may hold: bounds memory, not the result.
CHUNK_ELEMENTS = 2**25
MAX_DIM = 256


class Tiles(NamedTuple):
    """Queries and keys of a tile, queries of a chunk (None: as many as CHUNK_ELEMENTS allows), and warps."""

    queries: int
    keys: int
    chunk: int | None
    warps: int


@triton.jit
def selection_scores(q, k, query, key, tokens, keys, dim, q_token, k_token, DIM: tl.constexpr):
    """Scores of a tile of queries with a tile of keys, of one row and head."""
    column = tl.arange(0, DIM)
    is_in = (query < tokens)[:, None] & (column < dim)[None, :]
    q_tile = tl.load(q + query.to(tl.int64)[:, None] * q_token + column[None, :], mask=is_in, other=0.0)
    is_in = (key >= 0) & (key < keys)
    is_in = (column < dim)[:, None] & is_in[None, :]
    k_tile = tl.load(k + key.to(tl.int64)[None, :] * k_token + column[:, None], mask=is_in, other=0.0)
    return tl.dot(q_tile, k_tile, input_precision="tf32x3")


@triton.jit
def selection_better(best_score, best_key, scores, key, is_in):
    """The best score so far and its key, the first of equal ones."""
    scores = tl.where(is_in, scores, float("-inf"))
    tile_score = tl.max(scores, axis=1)
    tile_key = tl.min(tl.where(scores == tile_score[:, None], key[None, :], 2147483647), axis=1)
    is_better = tile_score > best_score
    return tl.where(is_better, tile_score, best_score), tl.where(is_better, tile_key, best_key)


@triton.jit
def selection_best_keys(
    q, k, start, position, q_index, best_scores, best_keys, begin, chunk, tokens, keys, heads, dim, slots,
    block, q_row, q_token, q_head, k_row, k_token,
    HAS_Q_INDEX: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The best score and key of one block for a tile of queries; slot N is each query's own block."""
    row, head = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2) % heads
    slot = tl.program_id(1)
    first = begin + tl.program_id(0) * QUERIES
    query = first + tl.arange(0, QUERIES)
    is_query = (query < tokens) & (query - begin < chunk)
    q_base = q + row * q_row + head * q_head
    k_base = k + row * k_row
    best_score = tl.full([QUERIES], float("-inf"), tl.float32)
    best_key = tl.zeros([QUERIES], tl.int32)
    if slot < slots:
        block_start = tl.load(start + row * slots + slot).to(tl.int32)
        for offset in range(0, block, KEYS):
            key = block_start + offset + tl.arange(0, KEYS)
            scores = selection_scores(q_base, k_base, query, key, tokens, keys, dim, q_token, k_token, DIM)
            is_in = (key < block_start + block)[None, :] & is_query[:, None]
            best_score, best_key = selection_better(best_score, best_key, scores, key, is_in)
    else:
        block_offset = tl.load(position + row * tokens + query, mask=is_query, other=0).to(tl.int32) % block
        token, low, span = query, first - block + 1, block + QUERIES - 1
        if HAS_Q_INDEX:
            token = tl.load(q_index + row * tokens + query, mask=is_query, other=-1).to(tl.int32)
            # The first query has the lowest index, so its block starts first.
            low = tl.load(q_index + row * tokens + first).to(tl.int32) - block + 1
            span = tl.max(token, axis=0) - low + 1
        for offset in range(0, span, KEYS):
            key = low + offset + tl.arange(0, KEYS)
            scores = selection_scores(q_base, k_base, query, key, tokens, keys, dim, q_token, k_token, DIM)
            is_in = (key[None, :] <= token[:, None]) & (key[None, :] >= (token - block_offset)[:, None])
            best_score, best_key = selection_better(
                best_score, best_key, scores, key, is_in & is_query[:, None]
            )
    index = ((row * chunk + (query - begin)) * heads + head) * (slots + 1) + slot
    tl.store(best_scores + index, best_score, mask=is_query)
    tl.store(best_keys + index, best_key, mask=is_query)


@torch.no_grad()
def select_by_max_triton(
    q: Float[Tensor, "B T J K"],
    k: Float[Tensor, "B S 1 K"],
    *,
    block: int,
    count: int,
    local: int,
    position: Int[Tensor, "B S"],
    q_index: Int[Tensor, "B T"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Int[Tensor, "B T J n"], Int[Tensor, "B T J m"]]:
    """`kernels.block_selection.select_by_max`; of the scores of a block only the best is kept.

    Raises ValueError for more than MAX_DIM dims or inputs on several devices.
    """
    rows, tokens, heads, dim = q.shape
    require(dim <= MAX_DIM, "q", f"at most {MAX_DIM} dims", dim)
    require(
        k.device == position.device == q.device, "k, position", f"on {q.device}", (k.device, position.device)
    )
    tiles = tiles or Tiles(128, 64, None, 8)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    windows, position = document_windows(position, block, block), at_queries(position, q_index).contiguous()
    start, token = windows.start.contiguous(), q_index_or_arange(q_index, tokens, q)
    q_index = None if q_index is None else q_index.contiguous()
    slots = start.shape[1]
    fitting = CHUNK_ELEMENTS // (rows * heads * (slots + 1)) // tiles.queries * tiles.queries
    chunk_size = min(tokens, tiles.chunk or max(tiles.queries, fitting))
    chosen, best_keys = [], []
    for begin in range(0, tokens, chunk_size):
        chunk = min(chunk_size, tokens - begin)
        shape = (rows, chunk, heads, slots + 1)
        slot_best_scores = torch.empty(shape, dtype=torch.float32, device=q.device)
        slot_best_keys = torch.empty(shape, dtype=torch.int32, device=q.device)
        selection_best_keys[(triton.cdiv(chunk, tiles.queries), slots + 1, rows * heads)](
            q, k, start, position, q_index, slot_best_scores, slot_best_keys, begin, chunk, tokens,
            k.shape[1], heads, dim, slots, block, *q.stride()[:3], *k.stride()[:2],
            HAS_Q_INDEX=q_index is not None, QUERIES=tiles.queries, KEYS=tiles.keys, DIM=max(16,
            triton.next_power_of_2(dim)), num_warps=tiles.warps,
        )  # fmt: skip
        chunk_position = position[:, begin : begin + chunk]
        chosen_slots = windows.choose(
            slot_best_scores[..., :slots],
            chunk_position,
            token[:, begin : begin + chunk],
            count=count,
            local=local,
        )
        # The own block is slot N, and first in the result.
        own = torch.full((*shape[:3], 1), slots, dtype=chosen_slots.dtype, device=q.device)
        best_keys.append(slot_best_keys.gather(3, torch.cat([own, chosen_slots.clamp(min=0)], dim=3)).long())
        chosen.append(chosen_slots)
    return torch.cat(chosen, dim=1), torch.cat(best_keys, dim=1)
