"""Attention over compressed entries in Triton, by the kernels of `kernels.attention`.

The complete windows of a document have consecutive slots from (its first token) // stride on, so what a query
sees is an interval of slots, and all of them are filled. Raw keys and entries under one softmax are the main
and the extra interval.

Letters: B rows, T queries, N slots of entries, M slots of blocks, n selected blocks, H query heads, G key
heads, R query heads of a key head, Q queries of a chunk.
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
from kernels.query_index import at_queries, q_index_or_arange

# Elements of the mass on entries that a chunk of queries may hold: bounds memory, not the result.
CHUNK_ELEMENTS = 1 << 24


def mass_tile(dtype: torch.dtype) -> Tile:
    """Queries and entries of a tile of `compressed_attention_mass`."""
    return Tile(64, 32, 4, 1) if dtype == torch.float32 else Tile(128, 128, 8, 2)


@triton.jit
def compressed_attention_mass(
    q,
    k,
    lse,
    low,
    high,
    mass,
    q_strides,
    k_strides,
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
    """Attention of `count` queries from `start` on to KEYS entries, summed over the heads of a key head.

    p = exp(s - lse), in the names of `kernels.attention.triton_forward`.
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    batch, group = (tl.program_id(2) // groups).to(tl.int64), (tl.program_id(2) % groups).to(tl.int64)
    index = tl.minimum(tile * ROWS + tl.arange(0, ROWS), count - 1)
    key = block * KEYS + tl.arange(0, KEYS)
    token = (start + index).to(tl.int64)
    begin, stop = tl.load(low + batch * tokens + token), tl.load(high + batch * tokens + token)
    acc = tl.zeros([ROWS, KEYS], tl.float32)
    if (tl.max(stop, axis=0) > block * KEYS) & (tl.min(begin, axis=0) < block * KEYS + KEYS):
        k_ptrs = (
            k
            + batch * k_strides[0]
            + group * k_strides[2]
            + tl.minimum(key, keys - 1).to(tl.int64) * k_strides[1]
        )
        k0 = attention_tile(k_ptrs, 0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
        k1 = k0
        if K1 > 0:
            k1 = attention_tile(k_ptrs, K0, K1, KEY_DIM, K0 + K1 > KEY_DIM)
        is_seen = (key[None, :] >= begin[:, None]) & (key[None, :] < stop[:, None])
        q_ptrs = q + batch * q_strides[0] + token * q_strides[1]
        lse_ptrs = lse + (batch * tokens + token) * (groups * REPEAT)
        for step in range(REPEAT):
            head = group * REPEAT + step
            q0 = attention_tile(q_ptrs + head * q_strides[2], 0, K0, KEY_DIM, K0 + K1 > KEY_DIM)
            q1 = q0
            if K1 > 0:
                q1 = attention_tile(q_ptrs + head * q_strides[2], K0, K1, KEY_DIM, K0 + K1 > KEY_DIM)
            s = attention_product(q0, q1, k0, k1, K1 > 0)
            lse_i = tl.load(lse_ptrs + head) * LOG2E
            # A query that sees nothing has a log-sum-exp of -inf.
            s = tl.where(is_seen, s * factor - lse_i[:, None], float("-inf"))
            acc += tl.exp2(s)
    mass_ptrs = mass + ((batch * count + index) * groups + group) * keys
    is_in = (tile * ROWS + tl.arange(0, ROWS) < count)[:, None] & (key < keys)[None, :]
    tl.store(mass_ptrs[:, None] + key[None, :], acc, mask=is_in)


def seen_entries(windows: Windows, position: Tensor, token_index: Tensor | None = None) -> Interval:
    """The slots of the windows that each query sees whole; position and token_index: those of the queries."""
    length, stride, slots = windows.length, windows.stride, windows.start.shape[1]
    position = position.to(torch.int32)
    token = q_index_or_arange(token_index, position.shape[1], position, torch.int32)
    opening = torch.div(token - position, stride, rounding_mode="floor")
    complete = torch.div(position + (1 - length), stride, rounding_mode="floor") + 1
    low = opening.clamp(0, slots)
    high = torch.maximum(low, (opening + complete.clamp_(min=0)).clamp_(max=slots))
    return Interval(low, high)


def attention_mass(
    q: Tensor, k: Tensor, lse: Tensor, spec: Spec, chunk: tuple[int, int], tile: Tile
) -> Tensor:
    """Attention of the queries of a chunk to each entry, summed over the heads of a key head; [B Q G N]."""
    (rows, tokens, heads, dim), (start, stop) = q.shape, chunk
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
        spec.main.low,
        spec.main.high,
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


def _chunks(q: Tensor, k: Tensor, chunk: int) -> Iterator[tuple[int, int]]:
    rows, tokens = q.shape[:2]
    size = max(1, chunk // (rows * k.shape[2] * max(1, k.shape[1])))
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
    q_index: Tensor | None,
    tile: Tile,
    chunk: int,
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    # Position and index of each chunk of queries, and their attention to every block [B Q G M].
    shares = block_shares(entries, blocks, position)
    token, position = q_index_or_arange(q_index, q.shape[1], q), at_queries(position, q_index)
    for a, b in _chunks(q, k, chunk):
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
    q_index: Tensor | None = None,
    tiles: Tiles | None = None,
    tile: Tile | None = None,
    chunk: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """`kernels.compressed_attention.entry_attention` in Triton."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if tiles is None:
        tiles = tiles_for(q.shape[3], v.shape[3], q.dtype, is_shared=False, is_windowed=False)
    spec = Spec(scale, None, seen_entries(entries, at_queries(position, q_index), q_index), None, tiles)
    out, lse = interval_attention(q, k, v, None, None, None, spec)
    windows = {"entries": entries, "blocks": blocks, "position": position, "q_index": q_index}
    tile = tile or mass_tile(q.dtype)
    return out, _chosen(q, k, lse, spec, choice, **windows, tile=tile, chunk=chunk)


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
    q_index: Tensor | None = None,
    tiles: Tiles | None = None,
    tile: Tile | None = None,
    chunk: int = CHUNK_ELEMENTS,
) -> Tensor:
    """`kernels.compressed_attention.select_by_entries` in Triton."""
    seen = seen_entries(entries, at_queries(position, q_index), q_index)
    operands = _with_lse(q, k, seen, scale, tiles)
    windows = {"entries": entries, "blocks": blocks, "position": position, "q_index": q_index}
    return _chosen(*operands, choice, **windows, tile=tile or mass_tile(q.dtype), chunk=chunk)


@torch.no_grad()
def entry_importance_triton(
    q: Tensor,
    k: Tensor,
    *,
    entries: Windows,
    blocks: Windows,
    position: Tensor,
    scale: float,
    q_index: Tensor | None = None,
    tiles: Tiles | None = None,
    tile: Tile | None = None,
    chunk: int = CHUNK_ELEMENTS,
) -> Tensor:
    """`kernels.compressed_attention.entry_importance` in Triton."""
    seen = seen_entries(entries, at_queries(position, q_index), q_index)
    operands = _with_lse(q, k, seen, scale, tiles)
    windows = {"entries": entries, "blocks": blocks, "position": position, "q_index": q_index}
    scored = _scored(*operands, **windows, tile=tile or mass_tile(q.dtype), chunk=chunk)
    return torch.cat([scores for _, scores in scored], dim=1)


def _with_lse(
    q: Tensor, k: Tensor, seen: Interval, scale: float, tiles: Tiles | None
) -> tuple[Tensor, Tensor, Tensor, Spec]:
    # Queries and entries as the kernels take them, the log-sum-exp of each query, and the spec.
    if tiles is None:
        tiles = tiles_for(q.shape[3], q.shape[3], q.dtype, is_shared=False, is_windowed=False)
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
    q_index: Tensor | None = None,
    token_index: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.compressed_attention.joint_attention` without a selection in Triton."""
    query_index = q_index_or_arange(q_index, position.shape[1], position, torch.int32)
    low = (query_index - position.to(torch.int32).clamp(max=window - 1)).clamp_(min=0)
    main = Interval(low, None if q_index is None else (query_index + 1).contiguous())
    if tiles is None:
        tiles = tiles_for(q.shape[3], q.shape[3], q.dtype, is_shared=True, is_windowed=True)
    spec = Spec(scale, None, main, seen_entries(windows, position, token_index), tiles)
    raw_keys, extra = (x.to(q.dtype)[:, :, None] for x in (kv, entries))
    out, lse = interval_attention(q, raw_keys, None, extra, None, sinks, spec)
    return out, lse.new_empty(*lse.shape[:2], 0)
