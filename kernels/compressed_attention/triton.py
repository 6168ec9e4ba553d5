"""Attention over compressed entries in Triton; the kernels are those of attention over intervals of keys.

The complete windows of a document have consecutive slots from (its first token) // stride on, so what a query
sees is an interval of slots, and every slot of it is filled.

Letters: B rows, T queries, N slots, H query heads, G key heads, R query heads of a key head, Q queries of a
slab.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.triton import (
    Interval,
    Spec,
    Tile,
    Tiles,
    attention_strides,
    dims_of,
    forward_launch,
    interval_attention,
    key_sets,
    tiles_for,
)
from kernels.attention.triton_forward import LOG2E, attention_product, attention_tile
from kernels.compressed_attention.entries import Choice, block_importance, block_shares
from kernels.document_windows import Windows
from kernels.places import at_places, query_tokens

# Numbers of attention to entries that a slab of queries may hold: bounds memory, not the result.
SLAB = 1 << 24


def mass_tile(dtype: torch.dtype) -> Tile:
    """Queries and entries of a program of the kernel below."""
    return Tile(64, 32, 4, 1) if dtype == torch.float32 else Tile(128, 128, 8, 2)


@triton.jit
def compressed_attention_mass(
    q,
    k,
    lse,
    low,
    high,
    mass,
    q_at,
    k_at,
    tokens,
    keys,
    start,
    count,
    groups,
    factor,
    REPEAT: tl.constexpr,
    KEY_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """For `count` queries from `start` on: attention to KEYS entries, summed over the heads of a key head."""
    tile, block = tl.program_id(0), tl.program_id(1)
    line, group = (tl.program_id(2) // groups).to(tl.int64), (tl.program_id(2) % groups).to(tl.int64)
    index = tl.minimum(tile * ROWS + tl.arange(0, ROWS), count - 1)
    key = block * KEYS + tl.arange(0, KEYS)
    token = (start + index).to(tl.int64)
    begin, stop = tl.load(low + line * tokens + token), tl.load(high + line * tokens + token)
    total = tl.zeros([ROWS, KEYS], tl.float32)
    if (tl.max(stop, axis=0) > block * KEYS) & (tl.min(begin, axis=0) < block * KEYS + KEYS):
        place = k + line * k_at[0] + group * k_at[2] + tl.minimum(key, keys - 1).to(tl.int64) * k_at[1]
        k0 = attention_tile(place, 0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
        k1 = k0
        if K1 > 0:
            k1 = attention_tile(place, K0, K1, KEY_DIM, K0 + K1 > KEY_DIM)
        is_seen = (key[None, :] >= begin[:, None]) & (key[None, :] < stop[:, None])
        place = q + line * q_at[0] + token * q_at[1]
        sums = lse + (line * tokens + token) * (groups * REPEAT)
        for step in range(REPEAT):
            head = group * REPEAT + step
            q0 = attention_tile(place + head * q_at[2], 0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
            q1 = q0
            if K1 > 0:
                q1 = attention_tile(place + head * q_at[2], K0, K1, KEY_DIM, K0 + K1 > KEY_DIM)
            score = attention_product(q0, q1, k0, k1, K1 > 0)
            own = tl.load(sums + head) * LOG2E
            # A query that sees nothing has a sum of -inf.
            score = tl.where(is_seen, score * factor - own[:, None], float("-inf"))
            total += tl.exp2(score)
    place = mass + ((line * count + index) * groups + group) * keys
    inside = (tile * ROWS + tl.arange(0, ROWS) < count)[:, None] & (key < keys)[None, :]
    tl.store(place[:, None] + key[None, :], total, mask=inside)


def seen_entries(windows: Windows, position: Tensor, tokens: Tensor | None = None) -> Interval:
    """The slots of the windows that each query sees whole; position and token are those of the queries."""
    length, stride, slots = windows.length, windows.stride, windows.start.shape[1]
    position = position.to(torch.int32)
    token = query_tokens(tokens, position.shape[1], position, torch.int32)
    opening = torch.div(token - position, stride, rounding_mode="floor")
    complete = torch.div(position + (1 - length), stride, rounding_mode="floor") + 1
    low = opening.clamp(0, slots)
    high = torch.maximum(low, (opening + complete.clamp_(min=0)).clamp_(max=slots))
    return Interval(low, high)


def attention_mass(
    q: Tensor, k: Tensor, lse: Tensor, spec: Spec, slab: tuple[int, int], tile: Tile
) -> Tensor:
    """Attention to each entry by the queries in slab, summed over the heads of a key head; [B Q G N]."""
    (rows, tokens, heads, dim), (start, stop) = q.shape, slab
    keys, groups = k.shape[1], k.shape[2]
    mass = torch.empty(rows, stop - start, groups, keys, dtype=torch.float32, device=q.device)
    if keys == 0:
        return mass
    grid = (triton.cdiv(stop - start, tile.rows), triton.cdiv(keys, tile.keys), rows * groups)
    dims = dims_of(dim)
    cast(Any, compressed_attention_mass)[grid](
        q,
        k,
        lse,
        spec.near.low,
        spec.near.high,
        mass,
        attention_strides(q),
        attention_strides(k),
        tokens,
        keys,
        start,
        stop - start,
        groups,
        spec.factors[0],
        REPEAT=heads // groups,
        KEY_DIM=dim,
        K0=dims.first,
        K1=dims.second,
        ROWS=tile.rows,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return mass


def _slabs(q: Tensor, k: Tensor, slab: int) -> Iterator[tuple[int, int]]:
    rows, tokens = q.shape[:2]
    size = max(1, slab // (rows * k.shape[2] * max(1, k.shape[1])))
    return ((a, min(a + size, tokens)) for a in range(0, tokens, size))


def _scored(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    spec: Spec,
    *,
    entries: Windows,
    blocks: Windows,
    position: Tensor,
    places: Tensor | None,
    tile: Tile,
    slab: int,
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    # Slabs of queries, by position and token, and how much each attends to every block [B Q G M].
    shares = block_shares(entries, blocks, position)
    token, position = query_tokens(places, q.shape[1], q), at_places(position, places)
    for a, b in _slabs(q, k, slab):
        mass = attention_mass(q, k, lse, spec, (a, b), tile)
        yield (position[:, a:b], token[:, a:b]), block_importance(mass, *shares)


@torch.no_grad()
def _chosen(q: Tensor, k: Tensor, lse: Tensor, spec: Spec, choice: Choice, **options: Any) -> Tensor:
    # The blocks with the most attention; [B T G n].
    if choice["count"] == 0:
        return torch.empty(*q.shape[:2], k.shape[2], 0, dtype=torch.long, device=q.device)
    scored = _scored(q, k, lse, spec, **options)
    return torch.cat([options["blocks"].choose(scores, *query, **choice) for query, scores in scored], dim=1)


def entry_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    entries: Windows,
    blocks: Windows,
    position: Tensor,
    scale: float,
    choice: Choice,
    places: Tensor | None = None,
    tiles: Tiles | None = None,
    tile: Tile | None = None,
    slab: int = SLAB,
) -> tuple[Tensor, Tensor]:
    """`kernels.compressed_attention.entry_attention` in Triton."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if tiles is None:
        tiles = tiles_for(q.shape[3], v.shape[3], q.dtype, is_shared=False, is_near=False)
    spec = Spec(scale, None, seen_entries(entries, at_places(position, places), places), None, tiles)
    out, lse = interval_attention(q, k, v, None, None, None, spec)
    windows = {"entries": entries, "blocks": blocks, "position": position, "places": places}
    tile = tile or mass_tile(q.dtype)
    return out, _chosen(q, k, lse, spec, choice, **windows, tile=tile, slab=slab)


@torch.no_grad()
def select_by_entries_triton(
    q: Tensor,
    k: Tensor,
    *,
    entries: Windows,
    blocks: Windows,
    position: Tensor,
    scale: float,
    choice: Choice,
    places: Tensor | None = None,
    tiles: Tiles | None = None,
    tile: Tile | None = None,
    slab: int = SLAB,
) -> Tensor:
    """`kernels.compressed_attention.select_by_entries` in Triton."""
    seen = seen_entries(entries, at_places(position, places), places)
    operands = _with_sums(q, k, seen, scale, tiles)
    windows = {"entries": entries, "blocks": blocks, "position": position, "places": places}
    return _chosen(*operands, choice, **windows, tile=tile or mass_tile(q.dtype), slab=slab)


@torch.no_grad()
def entry_importance_triton(
    q: Tensor,
    k: Tensor,
    *,
    entries: Windows,
    blocks: Windows,
    position: Tensor,
    scale: float,
    places: Tensor | None = None,
    tiles: Tiles | None = None,
    tile: Tile | None = None,
    slab: int = SLAB,
) -> Tensor:
    """`kernels.compressed_attention.entry_importance` in Triton."""
    seen = seen_entries(entries, at_places(position, places), places)
    operands = _with_sums(q, k, seen, scale, tiles)
    windows = {"entries": entries, "blocks": blocks, "position": position, "places": places}
    scored = _scored(*operands, **windows, tile=tile or mass_tile(q.dtype), slab=slab)
    return torch.cat([scores for _, scores in scored], dim=1)


def _with_sums(
    q: Tensor, k: Tensor, seen: Interval, scale: float, tiles: Tiles | None
) -> tuple[Tensor, Tensor, Tensor, Spec]:
    # Queries, entries, the log-sum-exp of each query, and how they were made.
    if tiles is None:
        tiles = tiles_for(q.shape[3], q.shape[3], q.dtype, is_shared=False, is_near=False)
    spec = Spec(scale, None, seen, None, tiles)
    q, keys, spec = key_sets(q, k.to(q.dtype), None, None, None, spec)
    _, lse = forward_launch(q, keys, None, spec, has_values=False)
    return q, keys.k, lse, spec


def joint_attention_triton(
    q: Tensor,
    kv: Tensor,
    entries: Tensor,
    sinks: Tensor,
    *,
    windows: Windows,
    position: Tensor,
    scale: float,
    window: int,
    places: Tensor | None = None,
    tokens: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.compressed_attention.joint_attention` without a selection in Triton."""
    place = query_tokens(places, position.shape[1], position, torch.int32)
    low = (place - position.to(torch.int32).clamp(max=window - 1)).clamp_(min=0)
    near = Interval(low, None if places is None else (place + 1).contiguous())
    if tiles is None:
        tiles = tiles_for(q.shape[3], q.shape[3], q.dtype, is_shared=True, is_near=True)
    spec = Spec(scale, None, near, seen_entries(windows, position, tokens), tiles)
    keys, far = (x.to(q.dtype)[:, :, None] for x in (kv, entries))
    out, lse = interval_attention(q, keys, None, far, None, sinks, spec)
    return out, lse.new_empty(*lse.shape[:2], 0)
