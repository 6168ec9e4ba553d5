"""The lightning indexer in Triton: scores of a slab of queries, and the best entries of each.

Letters: B rows, T queries, N index heads, D index dim, P entries, k chosen entries.
Scores of all pairs never exist at once: a slab of queries has its scores in memory, from which one program
per query takes the best by counting their bytes, the highest first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.indexer.reference import last_tokens
from kernels.places import at_places

# Numbers of scores of a slab.
SLAB = 2**26
MAX_DIM = 256


class Tiles(NamedTuple):
    """Queries and entries of a tile, entries that the choice reads at a time, queries of a slab, warps.

    slab of None is as many queries as fit SLAB.
    """

    queries: int
    entries: int
    read: int
    slab: int | None
    warps: int


class Entries(NamedTuple):
    """Whom each entry is visible to: from its last token on, in its document; documents may be None.

    document and places are those of queries; without places query t is token t.
    """

    last: Int[Tensor, "B P"]
    owner: Int[Tensor, "B P"] | None
    document: Int[Tensor, "B T"] | None
    places: Int[Tensor, "B T"] | None


def entries_of(
    k: Tensor, last: Tensor | None, document: Tensor | None, places: Tensor | None = None
) -> Entries:
    """Visibility of the entries k."""
    last = last_tokens(k, last).contiguous()
    places = None if places is None else places.contiguous()
    if document is None:
        return Entries(last, None, None, places)
    owner = document.gather(1, last.clamp(min=0))
    return Entries(last, owner, at_places(document, places).contiguous(), places)


def slab_of(rows: int, tokens: int, entries: int, tiles: Tiles) -> int:
    """Queries of a slab, whole tiles."""
    fitting = max(tiles.queries, SLAB // (rows * entries) // tiles.queries * tiles.queries)
    return min(tokens, tiles.slab or fitting)


def tiles_for() -> Tiles:
    """Tiles of a full warpgroup."""
    return Tiles(128, 64, 1024, None, 8)


@triton.jit
def index_visible(
    last, owner, document, places, row, query, entry, tokens, entries,
    HAS_DOCUMENTS: tl.constexpr, HAS_PLACES: tl.constexpr,
):  # fmt: skip
    """Which of the entries each of the queries can see."""
    at = tl.load(last + row * entries + entry, mask=entry < entries, other=-1)
    token = query
    if HAS_PLACES:
        token = tl.load(places + row * tokens + query, mask=query < tokens, other=-1)
    visible = (at >= 0)[None, :] & (at[None, :] <= token[:, None]) & (query < tokens)[:, None]
    if HAS_DOCUMENTS:
        of_entry = tl.load(owner + row * entries + entry, mask=entry < entries, other=-1)
        of_query = tl.load(document + row * tokens + query, mask=query < tokens, other=-2)
        visible = visible & (of_query[:, None] == of_entry[None, :])
    return visible


@triton.jit
def index_products(q, k_turned, query, first, n, tokens, dim, q_token, q_head, DIM: tl.constexpr):
    """Products of one head's queries with some entries."""
    column = tl.arange(0, DIM)
    place = (query - first)[:, None] * q_token + n * q_head + column[None, :]
    is_in = (query < tokens)[:, None] & (column < dim)[None, :]
    return tl.dot(tl.load(q + place, mask=is_in, other=0.0), k_turned, input_precision="tf32x3")


@triton.jit
def index_scores_slab(
    q, k, weights, last, owner, document, places, scores, begin, slab, tokens, heads, entries, dim,
    q_row, q_token, q_head, k_row, k_token, w_row, w_token, w_head,
    HAS_DOCUMENTS: tl.constexpr, HAS_PLACES: tl.constexpr,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of the slab, minus infinity where a query does not see an entry."""
    row = tl.program_id(2).to(tl.int64)
    first = begin + tl.program_id(0) * QUERIES
    query = first + tl.arange(0, QUERIES)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    visible = index_visible(
        last, owner, document, places, row, query, entry, tokens, entries, HAS_DOCUMENTS, HAS_PLACES
    )
    total = tl.zeros([QUERIES, ENTRIES], tl.float32)
    if tl.max(visible.to(tl.int32)) > 0:
        column = tl.arange(0, DIM)
        near = k + row * k_row + (tl.program_id(1).to(tl.int64) * ENTRIES) * k_token
        place = tl.arange(0, ENTRIES)[None, :] * k_token + column[:, None]
        is_in = (column < dim)[:, None] & (entry < entries)[None, :]
        k_turned = tl.load(near + place, mask=is_in, other=0.0)
        q_near = q + row * q_row + first.to(tl.int64) * q_token
        w_near = weights + row * w_row + first.to(tl.int64) * w_token
        for n in range(heads):
            product = index_products(q_near, k_turned, query, first, n, tokens, dim, q_token, q_head, DIM)
            w = tl.load(w_near + (query - first) * w_token + n * w_head, mask=query < tokens, other=0.0)
            total += tl.maximum(product, 0.0) * w.to(tl.float32)[:, None]
    total = tl.where(visible, total, float("-inf"))
    line = row * slab + (query - begin)
    is_in = ((query - begin) < slab)[:, None] & (entry < entries)[None, :]
    tl.store(scores + line[:, None] * entries + entry[None, :], total, mask=is_in)


@triton.jit
def index_key(scores, line, entry, entries):
    """Scores as whole numbers of the same order; 0 beyond the entries, 1 for minus infinity."""
    x = tl.load(scores + line * entries + entry, mask=entry < entries, other=float("-inf"))
    # Zeros of either sign are one score.
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    turned = tl.where(bits >= 2147483648, bits ^ 4294967295, bits | 2147483648)
    is_none = x == float("-inf")
    return tl.where(entry < entries, tl.where(is_none, 1, turned.to(tl.int64)), 0)


@triton.jit
def index_best(scores, chosen, begin, slab, tokens, entries, count, READ: tl.constexpr, BINS: tl.constexpr):
    """The places of one query's best entries in order, -1 behind them; of equal ones the earlier.

    Four passes find the lowest score that is chosen, byte by byte; a fifth collects.
    """
    row = tl.program_id(1).to(tl.int64)
    line = row * slab + tl.program_id(0)
    offset = tl.arange(0, READ)
    bins = tl.arange(0, BINS)
    prefix = tl.zeros([], tl.int64)
    room = tl.zeros([], tl.int32) + count
    for level in tl.static_range(4):
        shift = 24 - 8 * level
        totals = tl.zeros([BINS], tl.int32)
        for start in range(0, entries, READ):
            key = index_key(scores, line, start + offset, entries)
            is_open = (key >> (shift + 8)) == prefix
            byte = ((key >> shift) & 255).to(tl.int32)
            totals += tl.histogram(byte, BINS, mask=is_open)
        above = tl.cumsum(totals, reverse=True)
        # The highest byte from which on there are enough.
        edge = tl.max(tl.where(above >= room, bins, 0))
        prefix = prefix * 256 + edge
        room -= tl.sum(tl.where(bins > edge, totals, 0))
    found = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    target = chosen + (row * tokens + begin + tl.program_id(0)) * count
    for start in range(0, entries, READ):
        key = index_key(scores, line, start + offset, entries)
        is_tie = (key == prefix) & (key > 1)
        tie = ties + tl.cumsum(is_tie.to(tl.int32))
        is_chosen = (key > prefix) | (is_tie & (tie <= room))
        rank = found + tl.cumsum(is_chosen.to(tl.int32)) - 1
        tl.store(target + rank, (start + offset).to(tl.int64), mask=is_chosen)
        ties += tl.sum(is_tie.to(tl.int32))
        found += tl.sum(is_chosen.to(tl.int32))
    for start in range(0, count, READ):
        tl.store(target + start + offset, -1, mask=(start + offset >= found) & (start + offset < count))


@torch.no_grad()
def scores_slab(
    q: Tensor, k: Tensor, weights: Tensor, entries: Entries, begin: int, slab: int, tiles: Tiles
) -> Float[Tensor, "B s P"]:
    """Scores of the queries from `begin` on, s of them, minus infinity where an entry is not visible."""
    rows, tokens, heads, dim = q.shape
    count = k.shape[1]
    scores = torch.empty(rows, slab, count, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(slab, tiles.queries), triton.cdiv(count, tiles.entries), rows)
    index_scores_slab[grid](
        q, k, weights, *entries, scores, begin, slab, tokens, heads, count, dim, *q.stride()[:3],
        *k.stride()[:2], *weights.stride(), HAS_DOCUMENTS=entries.document is not None,
        HAS_PLACES=entries.places is not None,
        QUERIES=tiles.queries, ENTRIES=tiles.entries, DIM=max(16, triton.next_power_of_2(dim)),
        num_warps=tiles.warps, num_stages=2,
    )  # fmt: skip
    return scores


def checked(q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs as the kernels read them. Raises ValueError for too large a dim or another device."""
    require(q.shape[3] <= MAX_DIM, "q", f"at most {MAX_DIM} dims", q.shape[3])
    for name, x in (("k", k), ("weights", weights)):
        require(x.device == q.device, name, f"on {q.device}, as q", x.device)
    require(k.dtype == q.dtype, "k", f"dtype {q.dtype}, as q", k.dtype)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return q, k, weights


@torch.no_grad()
def index_select_triton(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    *,
    top_k: int,
    last: Int[Tensor, "B P"] | None = None,
    document: Int[Tensor, "B S"] | None = None,
    places: Int[Tensor, "B T"] | None = None,
    tiles: Tiles | None = None,
) -> Int[Tensor, "B T k"]:
    """`kernels.indexer.index_select`. Raises ValueError for more than MAX_DIM dims or several devices."""
    q, k, weights = checked(q, k, weights)
    rows, tokens = q.shape[:2]
    entries, tiles = entries_of(k, last, document, places), tiles or tiles_for()
    count = min(top_k, k.shape[1])
    chosen = torch.empty(rows, tokens, count, dtype=torch.int64, device=q.device)
    if count == 0:
        return chosen
    step = slab_of(rows, tokens, k.shape[1], tiles)
    for begin in range(0, tokens, step):
        slab = min(step, tokens - begin)
        scores = scores_slab(q, k, weights, entries, begin, slab, tiles)
        index_best[(slab, rows)](
            scores, chosen, begin, slab, tokens, k.shape[1], count, READ=tiles.read, BINS=256, num_warps=8
        )
    return chosen
