"""Softmax attention over compressed entries: alone, or with a window of raw keys under one softmax."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order, require_within
from kernels.choose import takes_triton
from kernels.compressed_attention.entries import (
    Choice,
    entry_attention_chunked,
    entry_importance_chunked,
    select_by_entries_chunked,
)
from kernels.compressed_attention.joint import joint_attention_chunked
from kernels.document_windows import Windows
from kernels.query_index import require_q_index

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
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Int[Tensor, "B T G n"]]:
    """Attention over the compressed entries of windows that a query sees whole, and the blocks it selects.

    k, v: compressed keys and values by slot of the windows `entries`. A query that sees none gets zero. The
    second result is the slots of the `count` blocks before the query's own with the most attention, summed
    over the query heads of a key head; an entry counts for a block by the strides that they share. The first
    `initial` blocks of the document and the last `local` ones before the own block go first; -1 where there
    are fewer. The selection has no gradient.
    position: that of each of the S tokens of the windows in its document. q_index: index of each query in its
    row of these tokens, rising along the row; None where T = S and queries are all of them.
    Native Sparse Attention, arXiv 2502.11089, section 3.3.1 and equations 8 to 10 (with indices from 1).

    Raises ValueError for an argument of the wrong shape.
    """
    _check(q, k, entries, blocks, position, q_index)
    options: dict[str, Any] = {"entries": entries, "blocks": blocks, "position": position, "scale": scale}
    options["q_index"] = q_index
    choice: Choice = {"count": count, "initial": initial, "local": local}
    if takes_triton("compressed_attention", q):
        from kernels.compressed_attention.triton import entry_attention_triton

        return entry_attention_triton(q, k, v, **options, choice=choice)
    return entry_attention_chunked(q, k, v, **options, choice=choice)


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
    q_index: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T G n"]:
    """The slots that `entry_attention` selects, without its output.

    Raises ValueError for an argument of the wrong shape.
    """
    _check(q, k, entries, blocks, position, q_index)
    options: dict[str, Any] = {"entries": entries, "blocks": blocks, "position": position, "scale": scale}
    options["q_index"] = q_index
    choice: Choice = {"count": count, "initial": initial, "local": local}
    if takes_triton("compressed_attention", q):
        from kernels.compressed_attention.triton import select_by_entries_triton

        return select_by_entries_triton(q, k, **options, choice=choice)
    return select_by_entries_chunked(q, k, **options, choice=choice)


@checked
def entry_importance(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    *,
    entries: Windows,
    blocks: Windows,
    position: Int[Tensor, "B S"],
    scale: float,
    q_index: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T G M"]:
    """Attention of each query to each of the M blocks, by which `select_by_entries` selects.

    Summed over the query heads of a key head: results for parts of the heads add up to that of all. In
    float32 at least, without a gradient.
    Native Sparse Attention, arXiv 2502.11089, equations 8 to 10 (with indices from 1).

    Raises ValueError for an argument of the wrong shape.
    """
    _check(q, k, entries, blocks, position, q_index)
    options: dict[str, Any] = {"entries": entries, "blocks": blocks, "position": position, "scale": scale}
    options["q_index"] = q_index
    if takes_triton("compressed_attention", q):
        from kernels.compressed_attention.triton import entry_importance_triton

        return entry_importance_triton(q, k, **options)
    return entry_importance_chunked(q, k, **options)


def _check(
    q: Tensor, k: Tensor, entries: Windows, blocks: Windows, position: Tensor, q_index: Tensor | None
) -> None:
    rows, tokens, heads, dim = q.shape
    slots = entries.start.shape
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require_q_index(q_index, tokens, position.shape[1], "position")
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
    q_index: Int[Tensor, "B T"] | None = None,
    token_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T c"]]:
    """Attention over the last `window` raw keys and over compressed entries under one softmax; and its mass.

    One key, which is its value too, serves all heads. entries are by slot of `windows`. selected: the slots
    that each query reads, -1 for none; None reads all entries whose windows it sees whole. sinks: a logit per
    head that takes part in the softmax and has no value. The second result is the attention probability of
    each selected entry, summed over heads, in float32 at least and without a gradient; c = k, or 0 without a
    selection.
    position: that of each query in its document. q_index: index of each query in its row of the S raw keys,
    which hold at least those that it sees; None where T = S and queries and keys are the same tokens.
    token_index: index of each query in the row of tokens that the windows are cut from; None is q_index. Both
    rise along a row. DeepSeek-V4: CSA with a selection, HCA without.

    Raises ValueError for an argument of the wrong shape or range.
    """
    count, dim = q.shape[1], q.shape[3]
    slots = windows.start.shape
    require(count > 0, "q", "at least one token", tuple(q.shape))
    require(entries.shape == (*slots, dim), "entries", (*slots, dim), tuple(entries.shape))
    require_q_index(q_index, count, kv.shape[1], "kv")
    require_order("token_index", token_index)
    require(window > 0, "window", "at least 1", window)
    if selected is not None:
        require(selected.shape[2] <= slots[1], "selected", f"at most {slots[1]}", selected.shape[2])
        require_within("selected", selected, -1, slots[1])
    options: dict[str, Any] = {"windows": windows, "position": position, "scale": scale, "window": window}
    options |= {"q_index": q_index, "token_index": q_index if token_index is None else token_index}
    if takes_triton("compressed_attention", q):
        if selected is None:
            from kernels.compressed_attention.triton import joint_attention_triton

            return joint_attention_triton(q, kv, entries, sinks, **options)
        from kernels.compressed_attention.triton_selected import joint_selected_triton

        del options["windows"], options["token_index"]
        deterministic = torch.are_deterministic_algorithms_enabled()
        return joint_selected_triton(
            q, kv, entries, sinks, selected, **options, is_deterministic=deterministic
        )
    return joint_attention_chunked(q, kv, entries, sinks, selected, **options)
