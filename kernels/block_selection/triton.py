"""The best key of every block in Triton: one program takes some queries and a block.

Letters: B rows, T queries, J selecting heads, K key dim, C tokens of a block, N slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.document_windows import document_windows
from kernels.places import at_places, query_tokens

# Numbers of a slab's best scores.
SLAB = 2**25
MAX_DIM = 256


class Tiles(NamedTuple):
    """Queries and keys of a tile, queries of a slab (None: as many as fit SLAB), and warps."""

    queries: int
    keys: int
    slab: int | None
    warps: int


@triton.jit
def selection_scores(q, k, query, key, tokens, keys, dim, q_token, k_token, DIM: tl.constexpr):
    """Scores of some queries and keys of one row and head."""
    column = tl.arange(0, DIM)
    is_in = (query < tokens)[:, None] & (column < dim)[None, :]
    left = tl.load(q + query.to(tl.int64)[:, None] * q_token + column[None, :], mask=is_in, other=0.0)
    is_in = (key >= 0) & (key < keys)
    is_in = (column < dim)[:, None] & is_in[None, :]
    right = tl.load(k + key.to(tl.int64)[None, :] * k_token + column[:, None], mask=is_in, other=0.0)
    return tl.dot(left, right, input_precision="tf32x3")


@triton.jit
def selection_better(best, at, scores, key, is_in):
    """The best score and its key so far, the earlier of equal ones."""
    scores = tl.where(is_in, scores, float("-inf"))
    top = tl.max(scores, axis=1)
    place = tl.min(tl.where(scores == top[:, None], key[None, :], 2147483647), axis=1)
    is_better = top > best
    return tl.where(is_better, top, best), tl.where(is_better, place, at)


@triton.jit
def selection_peaks(
    q, k, start, position, places, best, at, begin, slab, tokens, keys, heads, dim, slots, block,
    q_row, q_token, q_head, k_row, k_token,
    HAS_PLACES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The best key of one slot for a tile of queries, or with slot N of each query's own block."""
    row, head = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2) % heads
    slot = tl.program_id(1)
    first = begin + tl.program_id(0) * QUERIES
    query = first + tl.arange(0, QUERIES)
    is_query = (query < tokens) & (query - begin < slab)
    q_near = q + row * q_row + head * q_head
    k_near = k + row * k_row
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    place = tl.zeros([QUERIES], tl.int32)
    if slot < slots:
        opened = tl.load(start + row * slots + slot).to(tl.int32)
        for offset in range(0, block, KEYS):
            key = opened + offset + tl.arange(0, KEYS)
            scores = selection_scores(q_near, k_near, query, key, tokens, keys, dim, q_token, k_token, DIM)
            is_in = (key < opened + block)[None, :] & is_query[:, None]
            top, place = selection_better(top, place, scores, key, is_in)
    else:
        inside = tl.load(position + row * tokens + query, mask=is_query, other=0).to(tl.int32) % block
        token, low, span = query, first - block + 1, block + QUERIES - 1
        if HAS_PLACES:
            token = tl.load(places + row * tokens + query, mask=is_query, other=-1).to(tl.int32)
            # The first query stands first, so its block opens first.
            low = tl.load(places + row * tokens + first).to(tl.int32) - block + 1
            span = tl.max(token, axis=0) - low + 1
        for offset in range(0, span, KEYS):
            key = low + offset + tl.arange(0, KEYS)
            scores = selection_scores(q_near, k_near, query, key, tokens, keys, dim, q_token, k_token, DIM)
            is_in = (key[None, :] <= token[:, None]) & (key[None, :] >= (token - inside)[:, None])
            top, place = selection_better(top, place, scores, key, is_in & is_query[:, None])
    line = ((row * slab + (query - begin)) * heads + head) * (slots + 1) + slot
    tl.store(best + line, top, mask=is_query)
    tl.store(at + line, place, mask=is_query)


@torch.no_grad()
def select_by_peak_triton(
    q: Float[Tensor, "B T J K"],
    k: Float[Tensor, "B S 1 K"],
    *,
    block: int,
    count: int,
    local: int,
    position: Int[Tensor, "B S"],
    places: Int[Tensor, "B T"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Int[Tensor, "B T J n"], Int[Tensor, "B T J m"]]:
    """`kernels.block_selection.select_by_peak`; scores of a block are never kept, only its best.

    Raises ValueError for more than MAX_DIM dims or inputs on several devices.
    """
    rows, tokens, heads, dim = q.shape
    require(dim <= MAX_DIM, "q", f"at most {MAX_DIM} dims", dim)
    require(
        k.device == position.device == q.device, "k, position", f"on {q.device}", (k.device, position.device)
    )
    tiles = tiles or Tiles(128, 64, None, 8)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    windows, position = document_windows(position, block, block), at_places(position, places).contiguous()
    start, token = windows.start.contiguous(), query_tokens(places, tokens, q)
    places = None if places is None else places.contiguous()
    slots = start.shape[1]
    fitting = SLAB // (rows * heads * (slots + 1)) // tiles.queries * tiles.queries
    step = min(tokens, tiles.slab or max(tiles.queries, fitting))
    chosen, peaks = [], []
    for begin in range(0, tokens, step):
        slab = min(step, tokens - begin)
        shape = (rows, slab, heads, slots + 1)
        best = torch.empty(shape, dtype=torch.float32, device=q.device)
        at = torch.empty(shape, dtype=torch.int32, device=q.device)
        selection_peaks[(triton.cdiv(slab, tiles.queries), slots + 1, rows * heads)](
            q, k, start, position, places, best, at, begin, slab, tokens, k.shape[1], heads, dim, slots,
            block, *q.stride()[:3], *k.stride()[:2], HAS_PLACES=places is not None,
            QUERIES=tiles.queries, KEYS=tiles.keys, DIM=max(16, triton.next_power_of_2(dim)),
            num_warps=tiles.warps,
        )  # fmt: skip
        part = position[:, begin : begin + slab]
        taken = windows.choose(
            best[..., :slots], part, token[:, begin : begin + slab], count=count, local=local
        )
        # The own block stands behind the slots, and first in the result.
        own = torch.full((*shape[:3], 1), slots, dtype=taken.dtype, device=q.device)
        peaks.append(at.gather(3, torch.cat([own, taken.clamp(min=0)], dim=3)).long())
        chosen.append(taken)
    return torch.cat(chosen, dim=1), torch.cat(peaks, dim=1)
