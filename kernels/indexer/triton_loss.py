"""The indexer's loss in Triton, on chosen entries and on all; forward makes the gradients.

Letters: B rows, T queries, N index heads, D index dim, P entries, c chosen entries, H heads, K key dim.
The target is detached: d loss / d score = softmax(score) - target.
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
from kernels.indexer.triton import Entries, Tiles, checked, entries_of, scores_slab, slab_of, tiles_for
from kernels.selected_attention.triton import KEPT, sum_in_order

MAX_KEY_DIM = 512


class ChosenTiles(NamedTuple):
    """Entries of a tile, and warps."""

    entries: int
    warps: int


@triton.jit
def index_chosen_tile(
    k, entries, shares, line, row, start, count, dim, k_row, k_token,
    ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Some chosen entries of a query: their keys, shares, places, and which there are."""
    place = start + tl.arange(0, ENTRIES)
    entry = tl.load(entries + line * count + place, mask=place < count, other=-1).to(tl.int32)
    is_entry = entry >= 0
    share = tl.load(shares + line * count + place, mask=is_entry, other=0.0).to(tl.float32)
    column = tl.arange(0, DIM)
    source = k + row * k_row + entry[:, None] * k_token + column[None, :]
    keys = tl.load(source, mask=is_entry[:, None] & (column < dim)[None, :], other=0.0)
    return keys, share, entry, place, is_entry


@triton.jit
def index_chosen_loss(
    q, k, weights, entries, shares, losses, grad_q, grad_k, grad_w, begin, tokens, keys, heads, count, dim,
    q_row, q_token, q_head, k_row, k_token, w_row, w_token, w_head,
    KEEPS: tl.constexpr, HEADS: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The loss of one query over its own entries, and all its gradients; in two passes over the entries.

    Gradients of keys are added where the keys are, or with KEEPS kept by place for the queries from `begin`.
    """
    line = begin + tl.program_id(0).to(tl.int64)
    row, token = line // tokens, line % tokens
    head, column = tl.arange(0, HEADS), tl.arange(0, DIM)
    is_head = head < heads
    is_in = is_head[:, None] & (column < dim)[None, :]
    near = q + row * q_row + token * q_token
    queries = tl.load(near + head[:, None] * q_head + column[None, :], mask=is_in, other=0.0)
    w = tl.load(weights + row * w_row + token * w_token + head * w_head, mask=is_head, other=0.0)
    w = w.to(tl.float32)
    top = tl.full([], -1e30, tl.float32)
    total = tl.zeros([], tl.float32)
    mass = tl.zeros([], tl.float32)
    inner = tl.zeros([], tl.float32)
    along = tl.zeros([], tl.float32)
    for start in range(0, count, ENTRIES):
        near_k, share, _, _, is_entry = index_chosen_tile(
            k, entries, shares, line, row, start, count, dim, k_row, k_token, ENTRIES, DIM
        )
        product = tl.maximum(tl.dot(near_k, queries.T, input_precision="tf32x3"), 0.0)
        score = tl.sum(product * w[None, :], axis=1)
        mass += tl.sum(share, axis=0)
        safe = tl.where(share > 0, share, 1.0)
        inner += tl.sum(share * tl.log(safe), axis=0)
        along += tl.sum(share * score, axis=0)
        score = tl.where(is_entry, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(score - higher), axis=0)
        top = higher
    is_counted = mass > 0
    kept_loss = tl.where(is_counted, 1.0, 0.0)
    mass = tl.where(is_counted, mass, 1.0)
    size = top + tl.log(tl.where(total > 0, total, 1.0))
    # sum p log p - sum p (score - lse) with p = share / mass
    loss = (inner - along) / mass - tl.log(mass) + size
    tl.store(losses + line, loss * kept_loss)
    into_q = tl.zeros([HEADS, DIM], tl.float32)
    into_w = tl.zeros([HEADS], tl.float32)
    for start in range(0, count, ENTRIES):
        near_k, share, entry, place, is_entry = index_chosen_tile(
            k, entries, shares, line, row, start, count, dim, k_row, k_token, ENTRIES, DIM
        )
        product = tl.maximum(tl.dot(near_k, queries.T, input_precision="tf32x3"), 0.0)
        score = tl.where(is_entry, tl.sum(product * w[None, :], axis=1), float("-inf"))
        change = tl.where(is_entry, tl.exp(score - size) - share / mass, 0.0) * kept_loss
        into_w += tl.sum(product * change[:, None], axis=0)
        change = tl.where(product > 0, change[:, None] * w[None, :], 0.0).to(near_k.dtype)
        into_q = tl.dot(change.T, near_k, into_q, input_precision="tf32x3")
        into_k = tl.dot(change, queries, input_precision="tf32x3")
        is_in_k = is_entry[:, None] & (column < dim)[None, :]
        if KEEPS:
            kept = grad_k + tl.program_id(0).to(tl.int64) * count * dim
            tl.store(kept + place[:, None] * dim + column[None, :], into_k, mask=is_in_k)
        else:
            target = grad_k + row * keys * dim + entry[:, None] * dim + column[None, :]
            tl.atomic_add(target, into_k, mask=is_in_k, sem="relaxed")
    target = grad_q + line * heads * dim + head[:, None] * dim + column[None, :]
    tl.store(target, into_q.to(grad_q.dtype.element_ty), mask=is_in)
    tl.store(grad_w + line * heads + head, into_w.to(grad_w.dtype.element_ty), mask=is_head)


class ChosenIndexLoss(torch.autograd.Function):
    """q [B T N D], k [B P D], weights [B T N] -> the loss over the entries [B T c] that take `shares`."""

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
        """One launch, or two for each slab of queries with sums in a fixed order."""
        rows, tokens, heads, dim = q.shape
        keys, count = k.shape[1], entries.shape[2]
        losses = torch.empty(rows, tokens, dtype=torch.float32, device=q.device)
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_w = torch.empty(weights.shape, dtype=weights.dtype, device=q.device)
        grad_k = torch.zeros(rows, keys, 1, dim, dtype=torch.float32, device=q.device)

        def launch(into: Tensor, begin: int, queries: int, keeps: bool) -> None:
            index_chosen_loss[(queries,)](
                q, k, weights, entries, shares, losses, grad_q, into, grad_w, begin, tokens, keys, heads,
                count, dim, *q.stride()[:3], *k.stride()[:2], *weights.stride(), KEEPS=keeps,
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
                    sum_in_order([kept], entries[row, begin : begin + queries], [grad_k], row)
        else:
            launch(grad_k, 0, rows * tokens, False)
        ctx.save_for_backward(grad_q, grad_k[:, :, 0].to(k.dtype), grad_w)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """What forward found, times the factor of the loss."""
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
def index_mass_slab(
    q, k, lse, places, mass, begin, slab, tokens, keys, heads, repeat, key_dim, scale,
    q_row, q_token, q_head, k_row, k_token, k_head,
    HAS_PLACES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """What all heads of a slab's queries take of each token, zero of later ones."""
    row = tl.program_id(2).to(tl.int64)
    first = begin + tl.program_id(0) * QUERIES
    query = first + tl.arange(0, QUERIES)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    total = tl.zeros([QUERIES, KEYS], tl.float32)
    token, latest = query, first + QUERIES - 1
    if HAS_PLACES:
        token = tl.load(places + row * tokens + query, mask=query < tokens, other=-1).to(tl.int32)
        latest = tl.max(token, axis=0)
    visible = (key[None, :] <= token[:, None]) & (query < tokens)[:, None] & (key < keys)[None, :]
    if tl.program_id(1) * KEYS <= latest:
        for head in range(heads):
            scores = tl.zeros([QUERIES, KEYS], tl.float32)
            q_near = q + row * q_row + first.to(tl.int64) * q_token + head * q_head
            k_near = k + row * k_row + tl.program_id(1).to(tl.int64) * KEYS * k_token
            k_near += head // repeat * k_head
            for start in range(0, key_dim, DIM):
                column = start + tl.arange(0, DIM)
                is_in = (query < tokens)[:, None] & (column < key_dim)[None, :]
                place = tl.arange(0, QUERIES)[:, None] * q_token + column[None, :]
                left = tl.load(q_near + place, mask=is_in, other=0.0)
                is_in = (column < key_dim)[:, None] & (key < keys)[None, :]
                place = tl.arange(0, KEYS)[None, :] * k_token + column[:, None]
                right = tl.load(k_near + place, mask=is_in, other=0.0)
                scores = tl.dot(left, right, scores, input_precision="tf32x3")
            size = tl.load(lse + (row * tokens + query) * heads + head, mask=query < tokens, other=0.0)
            scores = tl.where(visible, scores * scale - size[:, None], float("-inf"))
            total += tl.exp(scores)
    is_in = ((query - begin) < slab)[:, None] & (key < keys)[None, :]
    line = row * slab + (query - begin)
    tl.store(mass + line[:, None] * keys + key[None, :], total, mask=is_in)


@triton.jit
def index_full_q(
    q, k, weights, change, grad_q, grad_w, begin, slab, tokens, heads, entries, dim,
    q_row, q_token, q_head, k_row, k_token, w_row, w_token, w_head,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of one head's queries and weights of a slab, from those of the scores."""
    row, n = tl.program_id(2).to(tl.int64), tl.program_id(0)
    first = begin + tl.program_id(1) * QUERIES
    query = first + tl.arange(0, QUERIES)
    is_query = (query < tokens) & (query - begin < slab)
    column = tl.arange(0, DIM)
    near = q + row * q_row + first.to(tl.int64) * q_token + n * q_head
    place = tl.arange(0, QUERIES)[:, None] * q_token + column[None, :]
    is_in = is_query[:, None] & (column < dim)[None, :]
    queries = tl.load(near + place, mask=is_in, other=0.0)
    w_place = row * w_row + query.to(tl.int64) * w_token + n * w_head
    w = tl.load(weights + w_place, mask=is_query, other=0.0).to(tl.float32)
    into = tl.zeros([QUERIES, DIM], tl.float32)
    into_w = tl.zeros([QUERIES], tl.float32)
    line = row * slab + (query - begin)
    for start in range(0, entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        is_entry = entry < entries
        near_k = k + row * k_row + entry.to(tl.int64)[:, None] * k_token + column[None, :]
        keys = tl.load(near_k, mask=is_entry[:, None] & (column < dim)[None, :], other=0.0)
        product = tl.maximum(tl.dot(queries, keys.T, input_precision="tf32x3"), 0.0)
        spot = change + line[:, None] * entries + entry[None, :]
        g = tl.load(spot, mask=is_query[:, None] & is_entry[None, :], other=0.0)
        into_w += tl.sum(product * g, axis=1)
        g = tl.where(product > 0, g * w[:, None], 0.0).to(keys.dtype)
        into = tl.dot(g, keys, into, input_precision="tf32x3")
    spot = (row * tokens + query) * heads + n
    target = grad_q + spot[:, None] * dim + column[None, :]
    tl.store(target, into.to(grad_q.dtype.element_ty), mask=is_in)
    tl.store(grad_w + spot, into_w.to(grad_w.dtype.element_ty), mask=is_query)


@triton.jit
def index_full_k(
    q, k, weights, change, grad_k, begin, slab, tokens, heads, entries, dim,
    q_row, q_token, q_head, k_row, k_token, w_row, w_token, w_head,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Adds what a slab's queries give to the gradients of some entries."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < entries
    column = tl.arange(0, DIM)
    is_in_k = is_entry[:, None] & (column < dim)[None, :]
    near_k = k + row * k_row + entry.to(tl.int64)[:, None] * k_token + column[None, :]
    keys = tl.load(near_k, mask=is_in_k, other=0.0)
    target = grad_k + (row * entries + entry)[:, None] * dim + column[None, :]
    into = tl.load(target, mask=is_in_k, other=0.0)
    for start in range(0, slab, QUERIES):
        place = start + tl.arange(0, QUERIES)
        query = (begin + place).to(tl.int64)
        is_query = place < slab
        line = row * slab + place
        spot = change + line[None, :] * entries + entry[:, None]
        g = tl.load(spot, mask=is_entry[:, None] & is_query[None, :], other=0.0)
        for n in range(heads):
            near = q + row * q_row + query[:, None] * q_token + n * q_head + column[None, :]
            queries = tl.load(near, mask=is_query[:, None] & (column < dim)[None, :], other=0.0)
            w_place = row * w_row + query * w_token + n * w_head
            w = tl.load(weights + w_place, mask=is_query, other=0.0).to(tl.float32)
            product = tl.dot(keys, queries.T, input_precision="tf32x3")
            along = tl.where(product > 0, g * w[None, :], 0.0).to(keys.dtype)
            into = tl.dot(along, queries, into, input_precision="tf32x3")
    tl.store(target, into, mask=is_in_k)


class Attended(NamedTuple):
    """What the target is made of: queries [B T H K], keys [B S G K], log-sum-exps [B T H], and the scale."""

    q: Tensor
    k: Tensor
    lse: Tensor
    scale: float
    size: int

    def shares(self, entries: Entries, begin: int, slab: int, tiles: Tiles) -> Float[Tensor, "B s P"]:
        """What the heads of the slab's queries take of each entry."""
        (rows, tokens, heads, dim), keys = self.q.shape, self.k.shape[1]
        mass = torch.empty(rows, slab, keys, dtype=torch.float32, device=self.q.device)
        grid = (triton.cdiv(slab, tiles.queries), triton.cdiv(keys, tiles.entries), rows)
        index_mass_slab[grid](
            self.q, self.k, self.lse, entries.places, mass, begin, slab, tokens, keys, heads,
            heads // self.k.shape[2], dim, self.scale, *self.q.stride()[:3], *self.k.stride()[:3],
            HAS_PLACES=entries.places is not None, QUERIES=tiles.queries, KEYS=tiles.entries,
            DIM=min(64, max(16, triton.next_power_of_2(dim))), num_warps=tiles.warps, num_stages=2,
        )  # fmt: skip
        if self.size == 1:
            return mass
        members = entry_tokens(entries.last, self.size).flatten(1)[:, None].expand(-1, slab, -1)
        return mass.gather(2, members).unflatten(2, (-1, self.size)).sum(3)


class FullIndexLoss(torch.autograd.Function):
    """q [B T N D], k [B P D], weights [B T N] -> the loss over all entries that a query sees."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, weights: Tensor, attended: Attended, entries: Entries, tiles: Tiles
    ) -> Tensor:
        """A slab of queries after the other."""
        rows, tokens, heads, dim = q.shape
        count = k.shape[1]
        loss = torch.zeros((), dtype=torch.float32, device=q.device)
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_w = torch.empty(weights.shape, dtype=weights.dtype, device=q.device)
        grad_k = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
        step = slab_of(rows, tokens, max(count, attended.k.shape[1]), tiles)
        strides = (*q.stride()[:3], *k.stride()[:2], *weights.stride())
        options = {
            "QUERIES": min(64, tiles.queries),
            "ENTRIES": min(64, tiles.entries),
            "DIM": max(16, triton.next_power_of_2(dim)),
            "num_warps": 4,
        }
        for begin in range(0, tokens, step):
            slab = min(step, tokens - begin)
            scores = scores_slab(q, k, weights, entries, begin, slab, tiles)
            part, change = divergence(
                scores, attended.shares(entries, begin, slab, tiles), scores > float("-inf")
            )
            loss += part
            sizes = (begin, slab, tokens, heads, count, dim)
            index_full_q[(heads, triton.cdiv(slab, options["QUERIES"]), rows)](
                q, k, weights, change, grad_q, grad_w, *sizes, *strides, **options
            )
            index_full_k[(triton.cdiv(count, options["ENTRIES"]), rows)](
                q, k, weights, change, grad_k, *sizes, *strides, **options
            )
        ctx.save_for_backward(grad_q, grad_k.to(k.dtype), grad_w)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """What forward found, times the factor of the loss."""
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
    places: Int[Tensor, "B T"] | None = None,
    tiles: Tiles | None = None,
) -> Float[Tensor, ""]:
    """`kernels.indexer.index_loss`. Raises ValueError as `index_select_triton`."""
    q, k, weights = checked(q, k, weights)
    require(attention_q.shape[3] <= MAX_KEY_DIM, "attention_q", f"at most {MAX_KEY_DIM} dims", "more")
    parts = (x.detach() for x in (attention_q, attention_k))
    parts = (x if x.stride(3) == 1 else x.contiguous() for x in parts)
    attended = Attended(*parts, lse.detach().float().contiguous(), scale, size)
    tiles = tiles or tiles_for()
    out = FullIndexLoss.apply(q, k, weights, attended, entries_of(k, last, document, places), tiles)
    return cast(Tensor, out)
