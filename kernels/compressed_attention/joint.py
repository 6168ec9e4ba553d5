"""Attention over a window of raw keys and compressed entries under one softmax, in plain torch.

Letters: B rows, T queries, S raw keys, H query heads, K dim of a key, which is its value too, N slots of
entries, k selected entries, Q queries of a chunk, M raw keys in the windows of a chunk.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.document_windows import Windows
from kernels.query_index import QueryChunk, q_index_or_arange, query_chunks

# Elements of the scores that a chunk of queries may hold: bounds memory, not the result.
CHUNK_ELEMENTS = 1 << 22
# Least queries of a chunk if the window is shorter: more of them read more masked keys, fewer make small
# products.
QUERIES = 128
# A product with all entries is about so many times as fast per entry as one with gathered entries.
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
            document_start = t - int(position[b, t])
            raw = [kv[b, s] for s in range(max(document_start, t - window + 1), t + 1)]
            chosen = [n for n in slots if starts[n] >= document_start and starts[n] + windows.length <= t + 1]
            if selected is not None:
                chosen = [n for n in selected[b, t].tolist() if n >= 0]
            keys = torch.stack(raw + [entries[b, n] for n in chosen])
            scores = torch.cat([q[b, t] @ keys.T * scale, sinks[:, None]], dim=-1)
            p = scores.softmax(-1)[:, :-1]
            out.append(p @ keys)
            if selected is not None:
                mass[b, t, selected[b, t] >= 0] = p[:, len(raw) :].detach().sum(0)
    return torch.stack(out).view_as(q), mass


def joint_attention_chunked(
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
    q_index: Int[Tensor, "B T"] | None = None,
    token_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T k"]]:
    """A chunk of queries at a time, in float32 at least; many scores are computed again for backward."""
    dtype, count = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    entries, sinks = entries.to(dtype), sinks.to(dtype)
    slots = entries.shape[1]
    gathers = selected is not None and _gathers(slots, selected)
    keys = window + (selected.shape[2] if selected is not None and gathers else slots)
    size = min(max(QUERIES, window), _chunk_size(q, keys))
    chunks = query_chunks(q_index, count, size)
    token, query_index = (q_index_or_arange(x, count, q) for x in (token_index, q_index))
    is_small = q.shape[0] * count * q.shape[2] * (keys + size) <= CHUNK_ELEMENTS
    outs, masses = [], []
    for chunk, window_keys in zip(
        chunks, _window_keys(kv.to(dtype), window, size, chunks, q_index), strict=True
    ):
        own = slice(chunk.start, chunk.stop)
        chosen = None if selected is None else selected[:, own]
        if chosen is None:
            seen = windows.is_seen(position[:, own], token[:, own])
        else:
            seen = chosen >= 0 if gathers else _marked(chosen, slots)
        distance = (
            query_index[:, own, None]
            - torch.arange(window_keys.shape[2], device=q.device)
            - (chunk.key_start - window + 1)
        )
        in_window = (distance >= 0) & (distance < window) & (distance <= position[:, own, None])
        visible = torch.cat([in_window, seen], dim=-1)
        operands = (q[:, own].to(dtype), window_keys, entries, sinks, chosen, gathers, visible, scale)
        if is_small:
            out, mass = _attend(*operands)
        else:
            out, mass = checkpoint(_attend, *operands, use_reentrant=False, preserve_rng_state=False)
        outs.append(out.to(q.dtype))
        masses.append(mass)
    return torch.cat(outs, dim=1), torch.cat(masses, dim=1)


def _window_keys(
    kv: Float[Tensor, "B S K"], window: int, size: int, chunks: list[QueryChunk], q_index: Tensor | None
) -> Iterable[Float[Tensor, "B K M"]]:
    """The raw keys of each chunk, from the start of its first query's window on; zeros before the row."""
    if q_index is None:
        padded = torch.nn.functional.pad(kv, (0, 0, window - 1, -kv.shape[1] % size))
        return padded.unfold(1, window - 1 + size, size).unbind(1)
    padded = torch.nn.functional.pad(kv, (0, 0, window - 1, 0))
    return [padded[:, chunk.key_start : chunk.key_stop + window - 1].mT for chunk in chunks]


def _attend(
    q: Tensor,
    window_keys: Tensor,
    entries: Tensor,
    sinks: Tensor,
    chosen: Tensor | None,
    gathers: bool,
    visible: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    window_scores = torch.einsum("bqhk,bks->bqhs", q, window_keys)
    # Entries for all queries [B N K], or for each query its own [B Q k K].
    entry_keys, letters = (
        (_taken(entries, chosen), "bqnk") if chosen is not None and gathers else (entries, "bnk")
    )
    entry_scores = torch.einsum(f"bqhk,{letters}->bqhn", q, entry_keys)
    scores = torch.cat([window_scores, entry_scores], dim=-1) * scale
    scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    sink = sinks[:, None].expand(*scores.shape[:3], 1)
    p = torch.cat([scores, sink], dim=-1).softmax(-1)
    p_window, p_entries, _ = p.split([window_keys.shape[-1], entry_scores.shape[-1], 1], dim=-1)
    out = torch.einsum("bqhs,bks->bqhk", p_window, window_keys) + torch.einsum(
        f"bqhn,{letters}->bqhk", p_entries, entry_keys
    )
    mass = p_entries.detach().sum(2)
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


def _chunk_size(q: Tensor, keys: int) -> int:
    rows, tokens, heads, _ = q.shape
    return min(tokens, max(1, CHUNK_ELEMENTS // (rows * heads * max(1, keys))))
