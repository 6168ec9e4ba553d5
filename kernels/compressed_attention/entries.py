"""Attention over compressed entries, and its mass on blocks, in plain torch: by query and by chunk of them.

Letters: B rows, T queries, S tokens, H query heads, G key heads, R query heads of a key head, K key dim, V
value dim, N slots of entries, M slots of blocks, n selected blocks, Q queries of a chunk, c entries that
reach into a block.
"""

from collections.abc import Iterator
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.document_windows import Windows
from kernels.query_index import at_queries, q_index_or_arange, queries_per_chunk

# Elements of the scores that a chunk of queries may hold: bounds memory, not the result.
CHUNK_ELEMENTS = 1 << 22


class Choice(TypedDict):
    """How many blocks are selected, and which go first; as `Windows.choose` takes them."""

    count: int
    initial: int
    local: int


def entry_attention_direct(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    v: Float[Tensor, "B N G V"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B T"],
    scale: float,
    choice: Choice,
) -> tuple[Float[Tensor, "B T H V"], Int[Tensor, "B T G n"]]:
    """One query at a time, in the caller's dtype; the attention to an entry is spread over its tokens."""
    rows, tokens, heads, _ = q.shape
    groups, repeat = k.shape[2], heads // k.shape[2]
    out = q.new_zeros(rows, tokens, heads, v.shape[-1])
    width = min(choice["count"], blocks.start.shape[1])
    chosen = torch.full((rows, tokens, groups, width), -1, device=q.device)
    for b in range(rows):
        windows = [(n, int(entries.start[b, n])) for n in entries.is_filled[b].nonzero().flatten().tolist()]
        for t in range(tokens):
            document_start = t - int(position[b, t])
            own = t - int(position[b, t]) % blocks.length
            seen = [(n, s) for n, s in windows if s >= document_start and s + entries.length <= t + 1]
            starts = list(range(document_start, own, blocks.length))
            for g in range(groups):
                by_token = q.new_zeros(tokens)
                for h in range(g * repeat, (g + 1) * repeat):
                    if not seen:
                        continue
                    p = torch.stack([q[b, t, h] @ k[b, n, g] * scale for n, _ in seen]).softmax(0)
                    out[b, t, h] = sum(w * v[b, n, g] for w, (n, _) in zip(p, seen, strict=True))
                    for w, (_, s) in zip(p.detach(), seen, strict=True):
                        by_token[s : s + entries.length] += w
                scores = [float(by_token[s : s + blocks.length].sum()) for s in starts]
                last = own - choice["local"] * blocks.length
                is_first = [i < choice["initial"] or s >= last for i, s in enumerate(starts)]
                order = sorted(range(len(starts)), key=lambda i: (not is_first[i], -scores[i]))
                for rank, i in enumerate(order[: choice["count"]]):
                    chosen[b, t, g, rank] = starts[i] // blocks.length
    return out, chosen


def entry_attention_chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    v: Float[Tensor, "B N G V"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    choice: Choice,
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Int[Tensor, "B T G n"]]:
    """A chunk of queries at a time, in float32 at least; probabilities are computed again for backward."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(dtype), v.to(dtype)
    shares = block_shares(entries, blocks, position)
    token, position = q_index_or_arange(q_index, q.shape[1], q), at_queries(position, q_index)
    outs, chosen = [], []
    for a, b in _chunks(q, k.shape[1]):
        query = position[:, a:b], token[:, a:b]
        seen = entries.is_seen(*query)
        out, mass = checkpoint(
            _attend, q[:, a:b].to(dtype), k, v, seen, scale, use_reentrant=False, preserve_rng_state=False
        )
        outs.append(out.to(q.dtype))
        chosen.append(blocks.choose(block_importance(mass, *shares), *query, **choice))
    return torch.cat(outs, dim=1), torch.cat(chosen, dim=1)


@torch.no_grad()
def entry_importance_chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T G M"]:
    """Attention to each block, a chunk of queries at a time."""
    scores = _scored(q, k, entries, blocks, position, scale, q_index)
    return torch.cat([part for _, part in scores], dim=1)


@torch.no_grad()
def select_by_entries_chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    choice: Choice,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T G n"]:
    """The selected blocks, a chunk of queries at a time."""
    scores = _scored(q, k, entries, blocks, position, scale, q_index)
    return torch.cat([blocks.choose(part, *query, **choice) for query, part in scores], dim=1)


def _scored(
    q: Tensor,
    k: Tensor,
    entries: Windows,
    blocks: Windows,
    position: Tensor,
    scale: float,
    q_index: Tensor | None,
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Position and index of each chunk of queries, and the attention of each query to every block."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, shares = k.to(dtype), block_shares(entries, blocks, position)
    token, position = q_index_or_arange(q_index, q.shape[1], q), at_queries(position, q_index)
    for a, b in _chunks(q, k.shape[1]):
        query = position[:, a:b], token[:, a:b]
        p = _probabilities(q[:, a:b].to(dtype), k, entries.is_seen(*query), scale)
        yield query, block_importance(p.sum(3), *shares)


def _probabilities(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqgrk,bngk->bqgrn", q.unflatten(2, (k.shape[2], -1)), k) * scale
    is_hidden = ~seen[:, :, None, None]
    # Finite, and masked again after the softmax, so that a query that sees nothing has p of zero.
    hidden = scores.masked_fill(is_hidden, torch.finfo(scores.dtype).min)
    return hidden.softmax(-1).masked_fill(is_hidden, 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    p = _probabilities(q, k, seen, scale)
    out = torch.einsum("bqgrn,bngv->bqgrv", p, v).flatten(2, 3)
    return out, p.detach().sum(3)


def block_shares(entries: Windows, blocks: Windows, position: Tensor) -> tuple[Tensor, Tensor]:
    """For each block the slots of entries that reach into it, and how many strides of each do; [B M c]."""
    stride, slots = entries.stride, entries.start.shape[1]
    length, size = entries.length // stride, blocks.length // stride
    cell = torch.arange(1 - length, size, device=position.device)
    count = torch.minimum(cell + length, cell.new_tensor(size)) - cell.clamp(min=0)
    start = blocks.start[..., None] + cell * stride
    slot = torch.div(start, stride, rounding_mode="floor").clamp(0, max(0, slots - 1))
    if slots == 0:
        return slot, torch.zeros_like(slot)
    position_of_start = position.gather(1, blocks.start.clamp(max=position.shape[1] - 1))[..., None]
    found = entries.start.gather(1, slot.flatten(1)).view_as(slot)
    filled = entries.is_filled.gather(1, slot.flatten(1)).view_as(slot)
    return slot, count * (filled & (found == start) & (position_of_start + cell * stride >= 0))


def block_importance(mass: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    """Attention [B Q G N] to entries, by blocks [B Q G M]."""
    if mass.shape[-1] == 0:
        return mass.new_zeros(*mass.shape[:3], slot.shape[1])
    index = slot.flatten(1)[:, None, None].expand(-1, *mass.shape[1:3], -1)
    taken = mass.gather(-1, index).unflatten(-1, slot.shape[1:])
    return (taken * count[:, None, None]).sum(-1)


def _chunks(q: Tensor, slots: int) -> list[tuple[int, int]]:
    rows, tokens, heads, _ = q.shape
    size = queries_per_chunk(q, rows * heads * slots, CHUNK_ELEMENTS)
    return [(a, min(a + size, tokens)) for a in range(0, tokens, size)]
