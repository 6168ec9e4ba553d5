"""The lightning indexer in Triton: scores of a chunk of queries, then the highest of each by radix selection.

The scores of one chunk of queries are in memory at a time. One program per query finds the k-th highest byte
by byte, with a histogram for each byte from the highest one on, and collects what is not lower.

Letters: B rows, T queries, S tokens, N index heads, D index dim, P entries, k chosen entries, s queries of a
chunk. x_row, x_token, x_head: strides of x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.indexer.reference import last_tokens
from kernels.query_index import at_queries

# Scores that a chunk of queries may hold: bounds memory, not the result.
CHUNK_ELEMENTS = 2**26
MAX_DIM = 256


class Tiles(NamedTuple):
    """Queries and entries of a tile, entries that the selection reads at a time, queries of a chunk, warps.

    chunk of None is as many queries as CHUNK_ELEMENTS allows.
    """

    queries: int
    entries: int
    read: int
    chunk: int | None
    warps: int


class Entries(NamedTuple):
    """Which queries see an entry: those of its document from its last token on.

    last: index of the last token of each entry, -1 for no entry. entry_document and document: of entries and
    of queries; None for one document. q_index: index of each query in the row; None: query t is token t.
    """

    last: Int[Tensor, "B P"]
    entry_document: Int[Tensor, "B P"] | None
    document: Int[Tensor, "B T"] | None
    q_index: Int[Tensor, "B T"] | None


def entries_of(
    k: Tensor, last: Tensor | None, document: Tensor | None, q_index: Tensor | None = None
) -> Entries:
    """Which queries see the entries k."""
    last = last_tokens(k, last).contiguous()
    q_index = None if q_index is None else q_index.contiguous()
    if document is None:
        return Entries(last, None, None, q_index)
    entry_document = document.gather(1, last.clamp(min=0))
    return Entries(last, entry_document, at_queries(document, q_index).contiguous(), q_index)


def chunk_of(rows: int, tokens: int, entries: int, tiles: Tiles) -> int:
    """Queries of a chunk, whole tiles."""
    fitting = max(tiles.queries, CHUNK_ELEMENTS // (rows * entries) // tiles.queries * tiles.queries)
    return min(tokens, tiles.chunk or fitting)


def tiles_for() -> Tiles:
    """Tiles for two of Hopper's warpgroups."""
    return Tiles(128, 64, 1024, None, 8)


@triton.jit
def index_visible(
    last, entry_document, document, q_index, row, query, entry, tokens, entries,
    HAS_DOCUMENTS: tl.constexpr, HAS_Q_INDEX: tl.constexpr,
):  # fmt: skip
    """Which of the entries each of the queries sees."""
    last_token = tl.load(last + row * entries + entry, mask=entry < entries, other=-1)
    token = query
    if HAS_Q_INDEX:
        token = tl.load(q_index + row * tokens + query, mask=query < tokens, other=-1)
    visible = (last_token >= 0)[None, :] & (last_token[None, :] <= token[:, None]) & (query < tokens)[:, None]
    if HAS_DOCUMENTS:
        of_entry = tl.load(entry_document + row * entries + entry, mask=entry < entries, other=-1)
        of_query = tl.load(document + row * tokens + query, mask=query < tokens, other=-2)
        visible = visible & (of_query[:, None] == of_entry[None, :])
    return visible


@triton.jit
def index_products(q, k_transposed, query, first, n, tokens, dim, q_token, q_head, DIM: tl.constexpr):
    """q_n k of a tile of queries of head n with a tile of entries."""
    column = tl.arange(0, DIM)
    q_offs = (query - first)[:, None] * q_token + n * q_head + column[None, :]
    is_in = (query < tokens)[:, None] & (column < dim)[None, :]
    return tl.dot(tl.load(q + q_offs, mask=is_in, other=0.0), k_transposed, input_precision="tf32x3")


@triton.jit
def index_scores_chunk(
    q, k, weights, last, entry_document, document, q_index, scores, begin, chunk, tokens, heads, entries, dim,
    strides,
    HAS_DOCUMENTS: tl.constexpr, HAS_Q_INDEX: tl.constexpr,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of queries and entries, minus infinity where a query does not see an entry."""
    q_row, q_token, q_head, k_row, k_token, w_row, w_token, w_head = strides
    row = tl.program_id(2).to(tl.int64)
    first = begin + tl.program_id(0) * QUERIES
    query = first + tl.arange(0, QUERIES)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    visible = index_visible(
        last,
        entry_document,
        document,
        q_index,
        row,
        query,
        entry,
        tokens,
        entries,
        HAS_DOCUMENTS,
        HAS_Q_INDEX,
    )
    acc = tl.zeros([QUERIES, ENTRIES], tl.float32)
    if tl.max(visible.to(tl.int32)) > 0:
        column = tl.arange(0, DIM)
        k_base = k + row * k_row + (tl.program_id(1).to(tl.int64) * ENTRIES) * k_token
        k_offs = tl.arange(0, ENTRIES)[None, :] * k_token + column[:, None]
        is_in = (column < dim)[:, None] & (entry < entries)[None, :]
        k_transposed = tl.load(k_base + k_offs, mask=is_in, other=0.0)
        q_base = q + row * q_row + first.to(tl.int64) * q_token
        w_base = weights + row * w_row + first.to(tl.int64) * w_token
        for n in range(heads):
            product = index_products(q_base, k_transposed, query, first, n, tokens, dim, q_token, q_head, DIM)
            w = tl.load(w_base + (query - first) * w_token + n * w_head, mask=query < tokens, other=0.0)
            acc += tl.maximum(product, 0.0) * w.to(tl.float32)[:, None]
    acc = tl.where(visible, acc, float("-inf"))
    row_index = row * chunk + (query - begin)
    is_in = ((query - begin) < chunk)[:, None] & (entry < entries)[None, :]
    tl.store(scores + row_index[:, None] * entries + entry[None, :], acc, mask=is_in)


@triton.jit
def index_key(scores, row_index, entry, entries):
    """Scores as whole numbers in the same order; 0 past the last entry, 1 for minus infinity."""
    x = tl.load(scores + row_index * entries + entry, mask=entry < entries, other=float("-inf"))
    # Zeros of either sign are one score.
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    ordered = tl.where(bits >= 2147483648, bits ^ 4294967295, bits | 2147483648)
    is_none = x == float("-inf")
    return tl.where(entry < entries, tl.where(is_none, 1, ordered.to(tl.int64)), 0)


@triton.jit
def index_best(scores, chosen, begin, chunk, tokens, entries, count, READ: tl.constexpr, BINS: tl.constexpr):
    """Indices of the `count` best entries of one query, rising, then -1; of equal scores the first entries.

    Four passes find the bytes of the lowest score that is chosen; a fifth collects.
    """
    row = tl.program_id(1).to(tl.int64)
    row_index = row * chunk + tl.program_id(0)
    offset = tl.arange(0, READ)
    bins = tl.arange(0, BINS)
    prefix = tl.zeros([], tl.int64)
    room = tl.zeros([], tl.int32) + count
    for level in tl.static_range(4):
        shift = 24 - 8 * level
        totals = tl.zeros([BINS], tl.int32)
        for start in range(0, entries, READ):
            key = index_key(scores, row_index, start + offset, entries)
            is_open = (key >> (shift + 8)) == prefix
            byte = ((key >> shift) & 255).to(tl.int32)
            totals += tl.histogram(byte, BINS, mask=is_open)
        above = tl.cumsum(totals, reverse=True)
        # The highest byte that is reached by as many scores as are needed.
        edge = tl.max(tl.where(above >= room, bins, 0))
        prefix = prefix * 256 + edge
        room -= tl.sum(tl.where(bins > edge, totals, 0))
    found = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    out_ptrs = chosen + (row * tokens + begin + tl.program_id(0)) * count
    for start in range(0, entries, READ):
        key = index_key(scores, row_index, start + offset, entries)
        is_tie = (key == prefix) & (key > 1)
        tie = ties + tl.cumsum(is_tie.to(tl.int32))
        is_chosen = (key > prefix) | (is_tie & (tie <= room))
        rank = found + tl.cumsum(is_chosen.to(tl.int32)) - 1
        tl.store(out_ptrs + rank, (start + offset).to(tl.int64), mask=is_chosen)
        ties += tl.sum(is_tie.to(tl.int32))
        found += tl.sum(is_chosen.to(tl.int32))
    for start in range(0, count, READ):
        tl.store(out_ptrs + start + offset, -1, mask=(start + offset >= found) & (start + offset < count))


@torch.no_grad()
def scores_chunk(
    q: Tensor, k: Tensor, weights: Tensor, entries: Entries, begin: int, chunk: int, tiles: Tiles
) -> Float[Tensor, "B s P"]:
    """Scores of the s queries from `begin` on, minus infinity where a query does not see an entry."""
    rows, tokens, heads, dim = q.shape
    count = k.shape[1]
    scores = torch.empty(rows, chunk, count, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(chunk, tiles.queries), triton.cdiv(count, tiles.entries), rows)
    index_scores_chunk[grid](
        q, k, weights, *entries, scores, begin, chunk, tokens, heads, count, dim,
        (*q.stride()[:3], *k.stride()[:2], *weights.stride()), HAS_DOCUMENTS=entries.document is not None,
        HAS_Q_INDEX=entries.q_index is not None,
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
    q_index: Int[Tensor, "B T"] | None = None,
    tiles: Tiles | None = None,
) -> Int[Tensor, "B T k"]:
    """`kernels.indexer.index_select`. Raises ValueError for more than MAX_DIM dims or several devices."""
    q, k, weights = checked(q, k, weights)
    rows, tokens = q.shape[:2]
    entries, tiles = entries_of(k, last, document, q_index), tiles or tiles_for()
    count = min(top_k, k.shape[1])
    chosen = torch.empty(rows, tokens, count, dtype=torch.int64, device=q.device)
    if count == 0:
        return chosen
    step = chunk_of(rows, tokens, k.shape[1], tiles)
    for begin in range(0, tokens, step):
        chunk = min(step, tokens - begin)
        scores = scores_chunk(q, k, weights, entries, begin, chunk, tiles)
        index_best[(chunk, rows)](
            scores, chosen, begin, chunk, tokens, k.shape[1], count, READ=tiles.read, BINS=256, num_warps=8
        )
    return chosen
