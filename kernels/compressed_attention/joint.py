"""Attention over a window of raw keys and compressed entries under one softmax, in plain torch.

Letters: B rows, T queries, S raw keys, H query heads, K dim of a key, which is its value too, N slots of
entries, k selected entries, W window, Q queries of a slab, M raw keys beside a slab.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.document_windows import Windows
from kernels.places import Span, query_tokens, spans

# Elements of the scores that a slab of queries may hold: bounds memory, not the result.
SLAB = 1 << 22
# Queries of a slab beside a window: more of them meet more raw keys outside it, fewer make short products.
QUERIES = 128
# A product with all entries is about this many times as fast per entry as one with gathered ones.
GATHERING = 32


def joint_attention_direct(
    q: Float[Tensor, "B T H K"],
    kv: Float[Tensor, "B T K"],
    entries: Float[Tensor, "B N K"],
    sinks: Float[Tensor, "H"],
    selected: Int[Tensor, "B T k"] | None,
    *,
    windows: Windows,
    position: Int[Tensor, "B T"],
    scale: float,
    window: int,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T k"]]:
    """One query at a time, in the caller's dtype."""
    rows, tokens = position.shape
    out = []
    mass = q.new_zeros(rows, tokens, 0 if selected is None else selected.shape[2])
    for b in range(rows):
        slots = windows.is_filled[b].nonzero().flatten().tolist()
        starts = {n: int(windows.start[b, n]) for n in slots}
        for t in range(tokens):
            opened = t - int(position[b, t])
            near = [kv[b, s] for s in range(max(opened, t - window + 1), t + 1)]
            chosen = [n for n in slots if starts[n] >= opened and starts[n] + windows.length <= t + 1]
            if selected is not None:
                chosen = [n for n in selected[b, t].tolist() if n >= 0]
            keys = torch.stack(near + [entries[b, n] for n in chosen])
            scores = torch.cat([q[b, t] @ keys.T * scale, sinks[:, None]], dim=-1)
            weights = scores.softmax(-1)[:, :-1]
            out.append(weights @ keys)
            if selected is not None:
                mass[b, t, selected[b, t] >= 0] = weights[:, len(near) :].detach().sum(0)
    return torch.stack(out).view_as(q), mass


def joint_attention_slabs(
    q: Float[Tensor, "B T H K"],
    kv: Float[Tensor, "B S K"],
    entries: Float[Tensor, "B N K"],
    sinks: Float[Tensor, "H"],
    selected: Int[Tensor, "B T k"] | None,
    *,
    windows: Windows,
    position: Int[Tensor, "B T"],
    scale: float,
    window: int,
    places: Int[Tensor, "B T"] | None = None,
    tokens: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T k"]]:
    """A slab of queries at a time, in float32 at least; many scores are computed again for backward."""
    dtype, count = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    entries, sinks = entries.to(dtype), sinks.to(dtype)
    slots = entries.shape[1]
    gathers = selected is not None and _gathers(slots, selected)
    keys = window + (selected.shape[2] if selected is not None and gathers else slots)
    size = min(max(QUERIES, window), _slab(q, keys))
    slabs = spans(places, count, size)
    token, place = (query_tokens(x, count, q) for x in (tokens, places))
    is_small = q.shape[0] * count * q.shape[2] * (keys + size) <= SLAB
    outs, masses = [], []
    for span, near in zip(slabs, _beside(kv.to(dtype), window, size, slabs, places), strict=True):
        own = slice(span.start, span.stop)
        chosen = None if selected is None else selected[:, own]
        if chosen is None:
            seen = windows.is_seen(position[:, own], token[:, own])
        else:
            seen = chosen >= 0 if gathers else _marked(chosen, slots)
        back = place[:, own, None] - torch.arange(near.shape[2], device=q.device) - (span.low - window + 1)
        is_near = (back >= 0) & (back < window) & (back <= position[:, own, None])
        visible = torch.cat([is_near, seen], dim=-1)
        operands = (q[:, own].to(dtype), near, entries, sinks, chosen, gathers, visible, scale)
        if is_small:
            out, mass = _attend(*operands)
        else:
            out, mass = checkpoint(_attend, *operands, use_reentrant=False, preserve_rng_state=False)
        outs.append(out.to(q.dtype))
        masses.append(mass)
    return torch.cat(outs, dim=1), torch.cat(masses, dim=1)


def _beside(
    kv: Float[Tensor, "B S K"], window: int, size: int, slabs: list[Span], places: Tensor | None
) -> Iterable[Float[Tensor, "B K M"]]:
    """Each slab's raw keys, from the first in the window of its first query on, zeros before the row."""
    if places is None:
        padded = torch.nn.functional.pad(kv, (0, 0, window - 1, -kv.shape[1] % size))
        return padded.unfold(1, window - 1 + size, size).unbind(1)
    padded = torch.nn.functional.pad(kv, (0, 0, window - 1, 0))
    return [padded[:, span.low : span.high + window - 1].mT for span in slabs]


def _attend(
    q: Tensor,
    near: Tensor,
    entries: Tensor,
    sinks: Tensor,
    chosen: Tensor | None,
    gathers: bool,
    visible: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    near_scores = torch.einsum("bqhk,bks->bqhs", q, near)
    # Entries for all queries [B N K], or for each query its own [B Q k K].
    far, letters = (_taken(entries, chosen), "bqnk") if chosen is not None and gathers else (entries, "bnk")
    far_scores = torch.einsum(f"bqhk,{letters}->bqhn", q, far)
    scores = torch.cat([near_scores, far_scores], dim=-1) * scale
    scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    sink = sinks[:, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)
    by_near, by_far, _ = weights.split([near.shape[-1], far_scores.shape[-1], 1], dim=-1)
    out = torch.einsum("bqhs,bks->bqhk", by_near, near) + torch.einsum(f"bqhn,{letters}->bqhk", by_far, far)
    mass = by_far.detach().sum(2)
    if chosen is None:
        return out, mass[..., :0]
    if not gathers:
        mass = mass.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0)
    return out, mass


def _gathers(slots: int, chosen: Tensor) -> bool:
    """Whether so few of all entries are chosen that gathering them is worth it."""
    return slots > GATHERING * chosen.shape[2]


def _marked(chosen: Tensor, count: int) -> Tensor:
    """Which of `count` entries each query chose, from their slots, -1 for none."""
    marks = torch.zeros(*chosen.shape[:2], count + 1, dtype=torch.bool, device=chosen.device)
    return marks.scatter_(2, torch.where(chosen < 0, count, chosen), True)[..., :count]


def _taken(entries: Tensor, chosen: Tensor) -> Tensor:
    index = chosen.clamp(min=0).flatten(1)[..., None].expand(-1, -1, entries.shape[-1])
    return entries.gather(1, index).view(*chosen.shape, entries.shape[-1])


def _slab(q: Tensor, keys: int) -> int:
    rows, tokens, heads, _ = q.shape
    return min(tokens, max(1, SLAB // (rows * heads * max(1, keys))))
