"""Attention over compressed entries and block importance in plain torch: directly, and by slabs of queries.

Letters: B rows, T queries, S tokens, H query heads, G key heads, R query heads of a key head, K key dim, V
value dim, N slots of entries, M slots of blocks, n selected blocks, Q queries of a slab.
"""

from collections.abc import Iterator
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.document_windows import Windows
from kernels.places import at_places, queries_at_once, query_tokens

# Elements of the scores that a slab of queries may hold: bounds memory, not the result.
SLAB = 1 << 22


class Choice(TypedDict):
    """How many blocks are chosen, and which go first; as `Windows.choose` takes them."""

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
            opened = t - int(position[b, t])
            own = t - int(position[b, t]) % blocks.length
            seen = [(n, s) for n, s in windows if s >= opened and s + entries.length <= t + 1]
            starts = list(range(opened, own, blocks.length))
            for g in range(groups):
                by_token = q.new_zeros(tokens)
                for h in range(g * repeat, (g + 1) * repeat):
                    if not seen:
                        continue
                    weights = torch.stack([q[b, t, h] @ k[b, n, g] * scale for n, _ in seen]).softmax(0)
                    out[b, t, h] = sum(w * v[b, n, g] for w, (n, _) in zip(weights, seen, strict=True))
                    for w, (_, s) in zip(weights.detach(), seen, strict=True):
                        by_token[s : s + entries.length] += w
                scores = [float(by_token[s : s + blocks.length].sum()) for s in starts]
                last = own - choice["local"] * blocks.length
                is_first = [i < choice["initial"] or s >= last for i, s in enumerate(starts)]
                order = sorted(range(len(starts)), key=lambda i: (not is_first[i], -scores[i]))
                for place, i in enumerate(order[: choice["count"]]):
                    chosen[b, t, g, place] = starts[i] // blocks.length
    return out, chosen


def entry_attention_slabs(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    v: Float[Tensor, "B N G V"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    choice: Choice,
    places: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Int[Tensor, "B T G n"]]:
    """A slab of queries at a time, in float32 at least; probabilities are computed again for backward."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(dtype), v.to(dtype)
    shares = block_shares(entries, blocks, position)
    token, position = query_tokens(places, q.shape[1], q), at_places(position, places)
    outs, chosen = [], []
    for a, b in _slabs(q, k.shape[1]):
        query = position[:, a:b], token[:, a:b]
        seen = entries.is_seen(*query)
        out, pooled = checkpoint(
            _attend, q[:, a:b].to(dtype), k, v, seen, scale, use_reentrant=False, preserve_rng_state=False
        )
        outs.append(out.to(q.dtype))
        chosen.append(blocks.choose(block_importance(pooled, *shares), *query, **choice))
    return torch.cat(outs, dim=1), torch.cat(chosen, dim=1)


@torch.no_grad()
def entry_importance_slabs(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    places: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T G M"]:
    """What blocks are chosen by, a slab of queries at a time."""
    scores = _scored(q, k, entries, blocks, position, scale, places)
    return torch.cat([part for _, part in scores], dim=1)


@torch.no_grad()
def select_by_entries_slabs(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    choice: Choice,
    places: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T G n"]:
    """The choice alone, a slab of queries at a time."""
    scores = _scored(q, k, entries, blocks, position, scale, places)
    return torch.cat([blocks.choose(part, *query, **choice) for query, part in scores], dim=1)


def _scored(
    q: Tensor,
    k: Tensor,
    entries: Windows,
    blocks: Windows,
    position: Tensor,
    scale: float,
    places: Tensor | None,
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Slabs of queries, by position and token, and how much each attends to every block."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, shares = k.to(dtype), block_shares(entries, blocks, position)
    token, position = query_tokens(places, q.shape[1], q), at_places(position, places)
    for a, b in _slabs(q, k.shape[1]):
        query = position[:, a:b], token[:, a:b]
        weights = _probabilities(q[:, a:b].to(dtype), k, entries.is_seen(*query), scale)
        yield query, block_importance(weights.sum(3), *shares)


def _probabilities(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqgrk,bngk->bqgrn", q.unflatten(2, (k.shape[2], -1)), k) * scale
    is_hidden = ~seen[:, :, None, None]
    # Finite, and hidden again after the softmax: a query that sees nothing has weights of zero.
    hidden = scores.masked_fill(is_hidden, torch.finfo(scores.dtype).min)
    return hidden.softmax(-1).masked_fill(is_hidden, 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    weights = _probabilities(q, k, seen, scale)
    out = torch.einsum("bqgrn,bngv->bqgrv", weights, v).flatten(2, 3)
    return out, weights.detach().sum(3)


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
    opening = position.gather(1, blocks.start.clamp(max=position.shape[1] - 1))[..., None]
    found = entries.start.gather(1, slot.flatten(1)).view_as(slot)
    filled = entries.is_filled.gather(1, slot.flatten(1)).view_as(slot)
    return slot, count * (filled & (found == start) & (opening + cell * stride >= 0))


def block_importance(pooled: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    """Attention [B Q G N] to entries, by blocks [B Q G M]."""
    if pooled.shape[-1] == 0:
        return pooled.new_zeros(*pooled.shape[:3], slot.shape[1])
    index = slot.flatten(1)[:, None, None].expand(-1, *pooled.shape[1:3], -1)
    taken = pooled.gather(-1, index).unflatten(-1, slot.shape[1:])
    return (taken * count[:, None, None]).sum(-1)


def _slabs(q: Tensor, slots: int) -> list[tuple[int, int]]:
    rows, tokens, heads, _ = q.shape
    size = queries_at_once(q, rows * heads * slots, SLAB)
    return [(a, min(a + size, tokens)) for a in range(0, tokens, size)]
