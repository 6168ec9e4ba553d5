"""Softmax attention over compressed entries: alone, or joined with a window of raw keys."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order, require_within
from kernels.choose import takes_triton
from kernels.compressed_attention.entries import (
    Choice,
    entry_attention_slabs,
    entry_importance_slabs,
    select_by_entries_slabs,
)
from kernels.compressed_attention.joint import joint_attention_slabs
from kernels.document_windows import Windows
from kernels.places import require_places

__all__ = [
    "Choice",
    "entry_attention",
    "entry_importance",
    "joint_attention",
    "select_by_entries",
]


@checked
def entry_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    v: Float[Tensor, "B N G V"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    count: int,
    initial: int,
    local: int,
    places: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Int[Tensor, "B T G n"]]:
    """Attention over the entries of windows that a query sees whole, and the blocks that it points to.

    k, v: the entries by slot of `entries`. A query that sees none gets zero. The second result are slots of
    the `count` blocks before the query's own that get the most attention, summed over the heads of a key
    head; an entry counts for a block by the strides that they share. The first `initial` blocks and the last
    `local` ones before the own block go first; -1 where there are fewer. No gradient goes through the choice.
    position is that of the S tokens whose windows these are. places: where the queries stand among them,
    rising along a row; None is T = S, all tokens in order.
    Native Sparse Attention, arXiv 2502.11089, equations 7 to 10 (its indices count from 1).

    Raises ValueError for an argument of the wrong shape.
    """
    _check(q, k, entries, blocks, position, places)
    options: dict[str, Any] = {"entries": entries, "blocks": blocks, "position": position, "scale": scale}
    options["places"] = places
    choice: Choice = {"count": count, "initial": initial, "local": local}
    if takes_triton("compressed_attention", q):
        from kernels.compressed_attention.triton import entry_attention_triton

        return entry_attention_triton(q, k, v, **options, choice=choice)
    return entry_attention_slabs(q, k, v, **options, choice=choice)


@checked
def select_by_entries(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    count: int,
    initial: int,
    local: int,
    places: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T G n"]:
    """The second result of `entry_attention` alone. Raises ValueError for an argument of the wrong shape."""
    _check(q, k, entries, blocks, position, places)
    options: dict[str, Any] = {"entries": entries, "blocks": blocks, "position": position, "scale": scale}
    options["places"] = places
    choice: Choice = {"count": count, "initial": initial, "local": local}
    if takes_triton("compressed_attention", q):
        from kernels.compressed_attention.triton import select_by_entries_triton

        return select_by_entries_triton(q, k, **options, choice=choice)
    return select_by_entries_slabs(q, k, **options, choice=choice)


@checked
def entry_importance(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    places: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T G M"]:
    """What `select_by_entries` chooses by: for each query the attention to every block, in float32 at least.

    Summed over the heads of a key head, so that sums over parts of its heads are those over all. No gradient.

    Raises ValueError for an argument of the wrong shape.
    """
    _check(q, k, entries, blocks, position, places)
    options: dict[str, Any] = {"entries": entries, "blocks": blocks, "position": position, "scale": scale}
    options["places"] = places
    if takes_triton("compressed_attention", q):
        from kernels.compressed_attention.triton import entry_importance_triton

        return entry_importance_triton(q, k, **options)
    return entry_importance_slabs(q, k, **options)


def _check(
    q: Tensor, k: Tensor, entries: Windows, blocks: Windows, position: Tensor, places: Tensor | None
) -> None:
    rows, tokens, heads, dim = q.shape
    slots = entries.start.shape
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require_places(places, tokens, position.shape[1], "position")
    require(k.shape[:2] == slots and k.shape[3] == dim, "k", (*slots, "G", dim), tuple(k.shape))
    require(heads % k.shape[2] == 0, "q", f"a multiple of {k.shape[2]} heads", heads)
    for name, x in (("k", k), ("position", position), ("entries", entries.start), ("blocks", blocks.start)):
        require(x.device == q.device, name, q.device, x.device)
    require(blocks.start.shape[0] == rows, "blocks", f"{rows} rows", blocks.start.shape[0])
    stride = entries.stride
    is_whole = entries.length % stride == 0 and blocks.length % stride == 0 and blocks.stride == blocks.length
    require(is_whole, "blocks", f"disjoint, and of whole strides of {stride}, as the entries", blocks.length)


@checked
def joint_attention(
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
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T c"]]:
    """Attention over the last `window` raw keys and compressed entries under one softmax, and where it went.

    One key, which is its value too, serves all heads. entries are by slot of `windows`. selected: the slots
    that each query reads, -1 for none; None reads all entries whose windows it sees whole. sinks: one more
    score per head, without a value. The second result is the attention on each selected entry, summed over
    heads, in float32 at least and without a gradient; c = k, or 0 without a selection.
    position is that of each query. places: where the queries stand among the raw keys, which are at least
    those that they see; None is T = S, all in order. tokens: where they stand in the row of the windows; None
    is as among the raw keys. Both rise along a row.

    Raises ValueError for an argument of the wrong shape or range.
    """
    count, dim = q.shape[1], q.shape[3]
    slots = windows.start.shape
    require(count > 0, "q", "at least one token", tuple(q.shape))
    require(entries.shape == (*slots, dim), "entries", (*slots, dim), tuple(entries.shape))
    require_places(places, count, kv.shape[1], "kv")
    require_order("tokens", tokens)
    require(window > 0, "window", "at least 1", window)
    if selected is not None:
        require(selected.shape[2] <= slots[1], "selected", f"at most {slots[1]}", selected.shape[2])
        require_within("selected", selected, -1, slots[1])
    options: dict[str, Any] = {"windows": windows, "position": position, "scale": scale, "window": window}
    options |= {"places": places, "tokens": places if tokens is None else tokens}
    if takes_triton("compressed_attention", q):
        if selected is None:
            from kernels.compressed_attention.triton import joint_attention_triton

            return joint_attention_triton(q, kv, entries, sinks, **options)
        from kernels.compressed_attention.triton_selected import joint_selected_triton

        del options["windows"], options["tokens"]
        deterministic = torch.are_deterministic_algorithms_enabled()
        return joint_selected_triton(
            q, kv, entries, sinks, selected, **options, is_deterministic=deterministic
        )
    return joint_attention_slabs(q, kv, entries, sinks, selected, **options)
