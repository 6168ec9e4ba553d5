"""The indexer's loss in Triton, over chosen entries and over all; forward computes the gradients.

The target is detached: ds = d loss / d score = softmax(score) - target. The softmax is online, in the names
of FlashAttention-2 (arXiv 2307.08691, algorithm 1, lines 9 and 13): m_i, m_new, l_i, lse_i. dq, dk and dw are
the gradients of q, k and weights.

Letters: B rows, T queries, S tokens, N index heads, D index dim, P entries, c chosen entries, H heads, G key
heads, K key dim, s queries of a chunk. A slot is an index into the c chosen entries of a query. x_row,
x_token, x_head: strides of x.
"""

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import require
from kernels.indexer.loss import divergence
from kernels.indexer.reference import entry_tokens
from kernels.indexer.triton import Entries, Tiles, checked, chunk_of, entries_of, scores_chunk, tiles_for
from kernels.selected_attention.triton import KEPT, sum_in_order

MAX_KEY_DIM = 512


class ChosenTiles(NamedTuple):
    """Entries of a tile, and warps."""

    entries: int
    warps: int


@triton.jit
def index_chosen_tile(
    k, entries, shares, query, row, start, count, dim, k_row, k_token,
    ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """A tile of chosen entries of a query: keys, shares, entries, slots, and which there are."""
    slot = start + tl.arange(0, ENTRIES)
    entry = tl.load(entries + query * count + slot, mask=slot < count, other=-1).to(tl.int32)
    is_entry = entry >= 0
    share = tl.load(shares + query * count + slot, mask=is_entry, other=0.0).to(tl.float32)
    column = tl.arange(0, DIM)
    k_ptrs = k + row * k_row + entry[:, None] * k_token + column[None, :]
    keys = tl.load(k_ptrs, mask=is_entry[:, None] & (column < dim)[None, :], other=0.0)
    return keys, share, entry, slot, is_entry


@triton.jit
def index_chosen_loss(
    q, k, weights, entries, shares, losses, dq, dk, dw, begin, tokens, keys, heads, count, dim,
    strides, KEEPS: tl.constexpr, HEADS: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The loss of one query over its own entries, and all its gradients, in two passes over the entries.

    Gradients of keys are added atomically, or with KEEPS kept by slot for the queries from `begin` on.
    """
    q_row, q_token, q_head, k_row, k_token, w_row, w_token, w_head = strides
    query = begin + tl.program_id(0).to(tl.int64)
    row, token = query // tokens, query % tokens
    head, column = tl.arange(0, HEADS), tl.arange(0, DIM)
    is_head = head < heads
    is_in = is_head[:, None] & (column < dim)[None, :]
    q_base = q + row * q_row + token * q_token
    q_tile = tl.load(q_base + head[:, None] * q_head + column[None, :], mask=is_in, other=0.0)
    w = tl.load(weights + row * w_row + token * w_token + head * w_head, mask=is_head, other=0.0)
    w = w.to(tl.float32)
    m_i = tl.full([], -1e30, tl.float32)
    l_i = tl.zeros([], tl.float32)
    share_sum = tl.zeros([], tl.float32)
    share_log_share = tl.zeros([], tl.float32)
    share_score = tl.zeros([], tl.float32)
    for start in range(0, count, ENTRIES):
        k_tile, share, _, _, is_entry = index_chosen_tile(
            k, entries, shares, query, row, start, count, dim, k_row, k_token, ENTRIES, DIM
        )
        product = tl.maximum(tl.dot(k_tile, q_tile.T, input_precision="tf32x3"), 0.0)
        score = tl.sum(product * w[None, :], axis=1)
        share_sum += tl.sum(share, axis=0)
        safe_share = tl.where(share > 0, share, 1.0)
        share_log_share += tl.sum(share * tl.log(safe_share), axis=0)
        share_score += tl.sum(share * score, axis=0)
        score = tl.where(is_entry, score, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(score, axis=0))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(score - m_new), axis=0)
        m_i = m_new
    is_counted = share_sum > 0
    counted = tl.where(is_counted, 1.0, 0.0)
    share_sum = tl.where(is_counted, share_sum, 1.0)
    lse_i = m_i + tl.log(tl.where(l_i > 0, l_i, 1.0))
    # sum p log p - sum p (score - lse) with p = share / share_sum
    loss = (share_log_share - share_score) / share_sum - tl.log(share_sum) + lse_i
    tl.store(losses + query, loss * counted)
    dq_tile = tl.zeros([HEADS, DIM], tl.float32)
    dw_tile = tl.zeros([HEADS], tl.float32)
    for start in range(0, count, ENTRIES):
        k_tile, share, entry, slot, is_entry = index_chosen_tile(
            k, entries, shares, query, row, start, count, dim, k_row, k_token, ENTRIES, DIM
        )
        product = tl.maximum(tl.dot(k_tile, q_tile.T, input_precision="tf32x3"), 0.0)
        score = tl.where(is_entry, tl.sum(product * w[None, :], axis=1), float("-inf"))
        ds = tl.where(is_entry, tl.exp(score - lse_i) - share / share_sum, 0.0) * counted
        dw_tile += tl.sum(product * ds[:, None], axis=0)
        ds = tl.where(product > 0, ds[:, None] * w[None, :], 0.0).to(k_tile.dtype)
        dq_tile = tl.dot(ds.T, k_tile, dq_tile, input_precision="tf32x3")
        dk_tile = tl.dot(ds, q_tile, input_precision="tf32x3")
        is_in_k = is_entry[:, None] & (column < dim)[None, :]
        if KEEPS:
            kept = dk + tl.program_id(0).to(tl.int64) * count * dim
            tl.store(kept + slot[:, None] * dim + column[None, :], dk_tile, mask=is_in_k)
        else:
            dk_ptrs = dk + row * keys * dim + entry[:, None] * dim + column[None, :]
            tl.atomic_add(dk_ptrs, dk_tile, mask=is_in_k, sem="relaxed")
    dq_ptrs = dq + query * heads * dim + head[:, None] * dim + column[None, :]
    tl.store(dq_ptrs, dq_tile.to(dq.dtype.element_ty), mask=is_in)
    tl.store(dw + query * heads + head, dw_tile.to(dw.dtype.element_ty), mask=is_head)


class ChosenIndexLoss(torch.autograd.Function):
    """q [B T N D], k [B P D], weights [B T N], entries and shares [B T c] -> the loss over these entries."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        entries: Tensor,
        shares: Tensor,
        is_deterministic: bool,
        tiles: ChosenTiles,
    ) -> Tensor:
        """One launch; with sums in a fixed order two for each chunk of queries."""
        rows, tokens, heads, dim = q.shape
        keys, count = k.shape[1], entries.shape[2]
        losses = torch.empty(rows, tokens, dtype=torch.float32, device=q.device)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dw = torch.empty(weights.shape, dtype=weights.dtype, device=q.device)
        dk = torch.zeros(rows, keys, 1, dim, dtype=torch.float32, device=q.device)

        def launch(dk_into: Tensor, begin: int, queries: int, keeps: bool) -> None:
            index_chosen_loss[(queries,)](
                q, k, weights, entries, shares, losses, dq, dk_into, dw, begin, tokens, keys, heads,
                count, dim, (*q.stride()[:3], *k.stride()[:2], *weights.stride()), KEEPS=keeps,
                HEADS=max(16, triton.next_power_of_2(heads)), ENTRIES=tiles.entries,
                DIM=max(16, triton.next_power_of_2(dim)), num_warps=tiles.warps, num_stages=1,
            )  # fmt: skip

        if is_deterministic:
            step = min(tokens, max(1, KEPT // (4 * count * dim)))
            for row in range(rows):
                for begin in range(0, tokens, step):
                    queries = min(step, tokens - begin)
                    shape = (queries, 1, count, dim)
                    kept = torch.empty(shape, dtype=torch.float32, device=q.device)
                    launch(kept, row * tokens + begin, queries, True)
                    sum_in_order([kept], entries[row, begin : begin + queries], [dk], row)
        else:
            launch(dk, 0, rows * tokens, False)
        ctx.save_for_backward(dq, dk[:, :, 0].to(k.dtype), dw)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward computed, times that of the loss."""
        return *((x * grads[0]).to(x.dtype) for x in ctx.saved_tensors), None, None, None, None


def index_loss_selected_triton(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    entries: Int[Tensor, "B T c"],
    shares: Float[Tensor, "B T c"],
    *,
    is_deterministic: bool = False,
    tiles: ChosenTiles | None = None,
) -> Float[Tensor, ""]:
    """`kernels.indexer.index_loss_of_chosen`. Raises ValueError as `index_select_triton`."""
    q, k, weights = checked(q, k, weights)
    require(k.stride(1) * k.shape[1] < 2**31, "k", "rows of fewer than 2^31 numbers", tuple(k.shape))
    tiles = tiles or ChosenTiles(64, 4)
    parts = (entries.contiguous(), shares.detach().contiguous())
    return cast(Tensor, ChosenIndexLoss.apply(q, k, weights, *parts, is_deterministic, tiles))


@triton.jit
def index_mass_chunk(
    q, k, lse, q_index, mass, begin, chunk, tokens, keys, heads, repeat, key_dim, scale,
    q_row, q_token, q_head, k_row, k_token, k_head,
    HAS_Q_INDEX: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """p = exp(s - lse) of a tile of queries and tokens, summed over heads; zero for later tokens."""
    row = tl.program_id(2).to(tl.int64)
    first = begin + tl.program_id(0) * QUERIES
    query = first + tl.arange(0, QUERIES)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    acc = tl.zeros([QUERIES, KEYS], tl.float32)
    token, last_key = query, first + QUERIES - 1
    if HAS_Q_INDEX:
        token = tl.load(q_index + row * tokens + query, mask=query < tokens, other=-1).to(tl.int32)
        last_key = tl.max(token, axis=0)
    visible = (key[None, :] <= token[:, None]) & (query < tokens)[:, None] & (key < keys)[None, :]
    if tl.program_id(1) * KEYS <= last_key:
        for head in range(heads):
            s = tl.zeros([QUERIES, KEYS], tl.float32)
            q_base = q + row * q_row + first.to(tl.int64) * q_token + head * q_head
            k_base = k + row * k_row + tl.program_id(1).to(tl.int64) * KEYS * k_token
            k_base += head // repeat * k_head
            for start in range(0, key_dim, DIM):
                column = start + tl.arange(0, DIM)
                is_in = (query < tokens)[:, None] & (column < key_dim)[None, :]
                q_offs = tl.arange(0, QUERIES)[:, None] * q_token + column[None, :]
                q_tile = tl.load(q_base + q_offs, mask=is_in, other=0.0)
                is_in = (column < key_dim)[:, None] & (key < keys)[None, :]
                k_offs = tl.arange(0, KEYS)[None, :] * k_token + column[:, None]
                k_tile = tl.load(k_base + k_offs, mask=is_in, other=0.0)
                s = tl.dot(q_tile, k_tile, s, input_precision="tf32x3")
            lse_i = tl.load(lse + (row * tokens + query) * heads + head, mask=query < tokens, other=0.0)
            s = tl.where(visible, s * scale - lse_i[:, None], float("-inf"))
            acc += tl.exp(s)
    is_in = ((query - begin) < chunk)[:, None] & (key < keys)[None, :]
    row_index = row * chunk + (query - begin)
    tl.store(mass + row_index[:, None] * keys + key[None, :], acc, mask=is_in)


@triton.jit
def index_full_q(
    q, k, weights, ds, dq, dw, begin, chunk, tokens, heads, entries, dim,
    q_row, q_token, q_head, k_row, k_token, w_row, w_token, w_head,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of q and weights of one head for a tile of queries, from those of the scores."""
    row, n = tl.program_id(2).to(tl.int64), tl.program_id(0)
    first = begin + tl.program_id(1) * QUERIES
    query = first + tl.arange(0, QUERIES)
    is_query = (query < tokens) & (query - begin < chunk)
    column = tl.arange(0, DIM)
    q_base = q + row * q_row + first.to(tl.int64) * q_token + n * q_head
    q_offs = tl.arange(0, QUERIES)[:, None] * q_token + column[None, :]
    is_in = is_query[:, None] & (column < dim)[None, :]
    q_tile = tl.load(q_base + q_offs, mask=is_in, other=0.0)
    w_offs = row * w_row + query.to(tl.int64) * w_token + n * w_head
    w = tl.load(weights + w_offs, mask=is_query, other=0.0).to(tl.float32)
    dq_tile = tl.zeros([QUERIES, DIM], tl.float32)
    dw_tile = tl.zeros([QUERIES], tl.float32)
    row_index = row * chunk + (query - begin)
    for start in range(0, entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        is_entry = entry < entries
        k_ptrs = k + row * k_row + entry.to(tl.int64)[:, None] * k_token + column[None, :]
        k_tile = tl.load(k_ptrs, mask=is_entry[:, None] & (column < dim)[None, :], other=0.0)
        product = tl.maximum(tl.dot(q_tile, k_tile.T, input_precision="tf32x3"), 0.0)
        ds_ptrs = ds + row_index[:, None] * entries + entry[None, :]
        ds_tile = tl.load(ds_ptrs, mask=is_query[:, None] & is_entry[None, :], other=0.0)
        dw_tile += tl.sum(product * ds_tile, axis=1)
        ds_tile = tl.where(product > 0, ds_tile * w[:, None], 0.0).to(k_tile.dtype)
        dq_tile = tl.dot(ds_tile, k_tile, dq_tile, input_precision="tf32x3")
    row_index = (row * tokens + query) * heads + n
    dq_ptrs = dq + row_index[:, None] * dim + column[None, :]
    tl.store(dq_ptrs, dq_tile.to(dq.dtype.element_ty), mask=is_in)
    tl.store(dw + row_index, dw_tile.to(dw.dtype.element_ty), mask=is_query)


@triton.jit
def index_full_k(
    q, k, weights, ds, dk, begin, chunk, tokens, heads, entries, dim,
    q_row, q_token, q_head, k_row, k_token, w_row, w_token, w_head,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of a tile of entries those from all queries of a chunk."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < entries
    column = tl.arange(0, DIM)
    is_in_k = is_entry[:, None] & (column < dim)[None, :]
    k_ptrs = k + row * k_row + entry.to(tl.int64)[:, None] * k_token + column[None, :]
    k_tile = tl.load(k_ptrs, mask=is_in_k, other=0.0)
    dk_ptrs = dk + (row * entries + entry)[:, None] * dim + column[None, :]
    dk_tile = tl.load(dk_ptrs, mask=is_in_k, other=0.0)
    for start in range(0, chunk, QUERIES):
        offset = start + tl.arange(0, QUERIES)
        query = (begin + offset).to(tl.int64)
        is_query = offset < chunk
        row_index = row * chunk + offset
        ds_ptrs = ds + row_index[None, :] * entries + entry[:, None]
        ds_tile = tl.load(ds_ptrs, mask=is_entry[:, None] & is_query[None, :], other=0.0)
        for n in range(heads):
            q_ptrs = q + row * q_row + query[:, None] * q_token + n * q_head + column[None, :]
            q_tile = tl.load(q_ptrs, mask=is_query[:, None] & (column < dim)[None, :], other=0.0)
            w_offs = row * w_row + query * w_token + n * w_head
            w = tl.load(weights + w_offs, mask=is_query, other=0.0).to(tl.float32)
            product = tl.dot(k_tile, q_tile.T, input_precision="tf32x3")
            ds_head = tl.where(product > 0, ds_tile * w[None, :], 0.0).to(k_tile.dtype)
            dk_tile = tl.dot(ds_head, q_tile, dk_tile, input_precision="tf32x3")
    tl.store(dk_ptrs, dk_tile, mask=is_in_k)


class Attended(NamedTuple):
    """The attention of the target: q [B T H K], k [B S G K], lse [B T H], scale, and tokens of an entry."""

    q: Tensor
    k: Tensor
    lse: Tensor
    scale: float
    size: int

    def shares(self, entries: Entries, begin: int, chunk: int, tiles: Tiles) -> Float[Tensor, "B s P"]:
        """Attention of the queries of a chunk to each entry, summed over heads."""
        (rows, tokens, heads, dim), keys = self.q.shape, self.k.shape[1]
        mass = torch.empty(rows, chunk, keys, dtype=torch.float32, device=self.q.device)
        grid = (triton.cdiv(chunk, tiles.queries), triton.cdiv(keys, tiles.entries), rows)
        index_mass_chunk[grid](
            self.q, self.k, self.lse, entries.q_index, mass, begin, chunk, tokens, keys, heads,
            heads // self.k.shape[2], dim, self.scale, *self.q.stride()[:3], *self.k.stride()[:3],
            HAS_Q_INDEX=entries.q_index is not None, QUERIES=tiles.queries, KEYS=tiles.entries,
            DIM=min(64, max(16, triton.next_power_of_2(dim))), num_warps=tiles.warps, num_stages=2,
        )  # fmt: skip
        if self.size == 1:
            return mass
        members = entry_tokens(entries.last, self.size).flatten(1)[:, None].expand(-1, chunk, -1)
        return mass.gather(2, members).unflatten(2, (-1, self.size)).sum(3)


class FullIndexLoss(torch.autograd.Function):
    """q [B T N D], k [B P D], weights [B T N] -> the loss over all entries that each query sees."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, weights: Tensor, attended: Attended, entries: Entries, tiles: Tiles
    ) -> Tensor:
        """One chunk of queries after the other."""
        rows, tokens, heads, dim = q.shape
        count = k.shape[1]
        loss = torch.zeros((), dtype=torch.float32, device=q.device)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dw = torch.empty(weights.shape, dtype=weights.dtype, device=q.device)
        dk = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
        step = chunk_of(rows, tokens, max(count, attended.k.shape[1]), tiles)
        strides = (*q.stride()[:3], *k.stride()[:2], *weights.stride())
        options = {
            "QUERIES": min(64, tiles.queries),
            "ENTRIES": min(64, tiles.entries),
            "DIM": max(16, triton.next_power_of_2(dim)),
            "num_warps": 4,
        }
        for begin in range(0, tokens, step):
            chunk = min(step, tokens - begin)
            scores = scores_chunk(q, k, weights, entries, begin, chunk, tiles)
            part, ds = divergence(
                scores, attended.shares(entries, begin, chunk, tiles), scores > float("-inf")
            )
            loss += part
            sizes = (begin, chunk, tokens, heads, count, dim)
            index_full_q[(heads, triton.cdiv(chunk, options["QUERIES"]), rows)](
                q, k, weights, ds, dq, dw, *sizes, *strides, **options
            )
            index_full_k[(triton.cdiv(count, options["ENTRIES"]), rows)](
                q, k, weights, ds, dk, *sizes, *strides, **options
            )
        ctx.save_for_backward(dq, dk.to(k.dtype), dw)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward computed, times that of the loss."""
        return *((x * grads[0]).to(x.dtype) for x in ctx.saved_tensors), None, None, None


def index_loss_full_triton(
    q: Float[Tensor, "B T N D"],
    k: Float[Tensor, "B P D"],
    weights: Float[Tensor, "B T N"],
    attention_q: Float[Tensor, "B T H K"],
    attention_k: Float[Tensor, "B S G K"],
    lse: Float[Tensor, "B T H"],
    *,
    scale: float,
    last: Int[Tensor, "B P"] | None,
    size: int,
    document: Int[Tensor, "B S"] | None,
    q_index: Int[Tensor, "B T"] | None = None,
    tiles: Tiles | None = None,
) -> Float[Tensor, ""]:
    """`kernels.indexer.index_loss`. Raises ValueError as `index_select_triton`."""
    q, k, weights = checked(q, k, weights)
    require(attention_q.shape[3] <= MAX_KEY_DIM, "attention_q", f"at most {MAX_KEY_DIM} dims", "more")
    parts = (x.detach() for x in (attention_q, attention_k))
    parts = (x if x.stride(3) == 1 else x.contiguous() for x in parts)
    attended = Attended(*parts, lse.detach().float().contiguous(), scale, size)
    tiles = tiles or tiles_for()
    out = FullIndexLoss.apply(q, k, weights, attended, entries_of(k, last, document, q_index), tiles)
    return cast(Tensor, out)
