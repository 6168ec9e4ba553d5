"""Attention over compressed entries on drawn inputs: with a choice of blocks, and joined with a window."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention.triton import Tile, Tiles
from kernels.compressed_attention import CASES, JOINT_CASES, Case, JointCase
from kernels.compressed_attention.entries import entry_attention_direct
from kernels.compressed_attention.joint import joint_attention_direct
from kernels.compressed_attention.triton import (
    CHUNK_ELEMENTS,
    entry_attention_triton,
    joint_attention_triton,
    select_by_entries_triton,
)
from kernels.compressed_attention.triton_selected import joint_selected_triton
from kernels.document_windows import document_windows
from kernels.selected_attention.trials import WIDE_NEWEST
from kernels.selected_attention.triton import Tiles as SelectedTiles
from kernels.trial import Outputs, Setting, Subject, Trial, Work

SMALL = Tiles(Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), programs=3)
SMALL_MASS = Tile(16, 16, 1, 1)


class Packed(NamedTuple):
    """A shape, and the mean length of its documents; 0 for one in each row."""

    case: Case
    documents: float = 0.0


class JointPacked(NamedTuple):
    """The same of the joint attention."""

    case: JointCase
    documents: float = 0.0


def _positions(setting: Setting, rows: int, tokens: int, documents: float) -> Tensor:
    if documents:
        return setting.documents(rows, tokens, documents)[1]
    return torch.arange(tokens, device=setting.device).expand(rows, -1)


def draw_entries(packed: Packed, setting: Setting) -> Trial:
    """Outputs, the chosen blocks in order of slots, and the same from the choice alone."""
    case = packed.case
    position = _positions(setting, case.rows, case.tokens, packed.documents)
    entries = document_windows(position, case.length, case.stride)
    shape = (case.rows, entries.start.shape[1], case.key_heads)
    inputs = {
        "q": setting.normal(case.rows, case.tokens, case.heads, case.key_dim),
        "k": setting.normal(*shape, case.key_dim),
        "v": setting.normal(*shape, case.value_dim),
    }
    options: dict[str, Any] = {
        "entries": entries,
        "blocks": document_windows(position, case.block, case.block),
        "position": position,
        "scale": case.key_dim**-0.5,
        "choice": {"count": case.chosen, "initial": 1, "local": 1},
    }
    small: dict[str, Any] = {}
    if setting.is_small:
        small = {"tiles": SMALL, "tile": SMALL_MASS, "chunk": min(CHUNK_ELEMENTS, 500)}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        out, chosen = entry_attention_triton(q, k, v, **options, **small)
        alone = select_by_entries_triton(q, k, **options, **small)
        return out, chosen.sort(-1).values, alone.sort(-1).values

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        out, chosen = entry_attention_direct(q, k, v, **options)
        chosen = chosen.sort(-1).values
        # Inputs that no query sees have gradients of zero, too.
        return out + 0 * (q.sum() + k.sum() + v.sum()), chosen, chosen

    return Trial(inputs, ours, truth)


def draw_joint(packed: JointPacked, setting: Setting) -> Trial:
    """Outputs, and an empty share of a selection."""
    case = packed.case
    position = _positions(setting, case.rows, case.tokens, packed.documents)
    windows = document_windows(position, case.length, case.length)
    inputs = {
        "q": setting.normal(case.rows, case.tokens, case.heads, case.dim),
        "kv": setting.normal(case.rows, case.tokens, case.dim),
        "entries": setting.normal(case.rows, windows.start.shape[1], case.dim),
        "sinks": setting.uniform(case.heads, low=-2.0, high=2.0),
    }
    options: dict[str, Any] = {"windows": windows, "position": position, "scale": case.dim**-0.5}
    options |= {"window": case.window}
    tiles = SMALL if setting.is_small else None

    def ours(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> Outputs:
        return joint_attention_triton(q, kv, entries, sinks, **options, tiles=tiles)

    def truth(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> Outputs:
        out, mass = joint_attention_direct(q, kv, entries, sinks, None, **options)
        return out + 0 * entries.sum(), mass

    return Trial(inputs, ours, truth)


def draw_selected(packed: JointPacked, setting: Setting) -> Trial:
    """A window joined with entries that each query chose at random among those that it sees."""
    case = packed.case
    position = _positions(setting, case.rows, case.tokens, packed.documents)
    windows = document_windows(position, case.length, case.length)
    slots = windows.start.shape[1]
    count = min(case.chosen or 1, slots)
    scores = setting.uniform(case.rows, case.tokens, slots).masked_fill(~windows.is_seen(position), -1.0)
    best = scores.topk(count, dim=-1)
    selected = torch.where(best.values < 0, -1, best.indices)
    inputs = {
        "q": setting.normal(case.rows, case.tokens, case.heads, case.dim),
        "kv": setting.normal(case.rows, case.tokens, case.dim),
        "entries": setting.normal(case.rows, slots, case.dim),
        "sinks": setting.uniform(case.heads, low=-2.0, high=2.0),
    }
    options: dict[str, Any] = {"position": position, "scale": case.dim**-0.5, "window": case.window}
    tiles = SelectedTiles(16, 16, 1, 1) if setting.is_small else None

    def ours(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> Outputs:
        more = {"is_deterministic": False, "tiles": tiles}
        return joint_selected_triton(q, kv, entries, sinks, selected, **options, **more)

    def truth(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> Outputs:
        out, mass = joint_attention_direct(q, kv, entries, sinks, selected, windows=windows, **options)
        return out + 0 * entries.sum(), mass

    return Trial(inputs, ours, truth)


def work_of_selected(packed: JointPacked) -> Work:
    """Two products of all pairs forward, five backward."""
    case = packed.case
    pairs = float(case.rows * case.tokens * (case.window + (case.chosen or 0)))
    queries = 2.0 * case.rows * case.tokens * case.heads * case.dim
    keys = 2.0 * case.rows * (case.tokens + case.tokens // case.length) * case.dim
    flops = 4.0 * case.heads * case.dim * pairs
    return Work(flops, 2 * queries + keys, 2.5 * flops, 4 * queries + 2 * keys)


def _entry_pairs(tokens: int, length: int, stride: int) -> float:
    # Pairs of a query and an entry that it sees, in one document.
    return max(0, tokens - length) ** 2 / (2 * stride)


def work_of_entries(packed: Packed) -> Work:
    """Scores and values, and the scores again for the choice; as much for the choice alone. Backward five."""
    case = packed.case
    seen = 2.0 * case.rows * case.heads * _entry_pairs(case.tokens, case.length, case.stride)
    slots = case.tokens // case.stride
    read = case.tokens * case.heads * case.key_dim + slots * case.key_heads * (case.key_dim + case.value_dim)
    read, out = 2.0 * case.rows * read, 2.0 * case.rows * case.tokens * case.heads * case.value_dim
    chosen = 8.0 * case.rows * case.tokens * case.key_heads * case.chosen
    forward = seen * (case.key_dim * 4 + case.value_dim)
    backward = seen * (3 * case.key_dim + 2 * case.value_dim)
    return Work(forward, 2 * read + out + 2 * chosen, backward, 2 * read + 2 * out)


def work_of_joint(packed: JointPacked) -> Work:
    """Two products of all pairs forward, five backward."""
    case = packed.case
    near = case.window * case.tokens - case.window * (case.window - 1) / 2
    pairs = near + _entry_pairs(case.tokens, case.length, case.length)
    flops = 4.0 * case.rows * case.heads * case.dim * pairs
    queries = 2.0 * case.rows * case.tokens * case.heads * case.dim
    keys = 2.0 * case.rows * (case.tokens + case.tokens // case.length) * case.dim
    return Work(flops, 2 * queries + keys, 2.5 * flops, 4 * queries + 2 * keys)


# A sum of 64 rows and 256 columns takes half of the registers; operands of 512 columns have many places.
EXCUSED = {
    "attention_backward_queries": "50 reloads for the 66 products of a tile: places of operands, addresses",
    "attention_backward_keys": "reloads outside its loops, and a few for the 68 products of a tile",
}
SUBJECTS = (
    Subject(
        "compressed_attention.entries",
        (
            *(Packed(case, documents) for case in CASES for documents in (0.0, 15.0)),
            Packed(Case(1, 40, 6, 2, 24, 80, 4, 2, 8, 2), 20.0),
        ),
        lambda tokens: Packed(Case(1, tokens, 64, 4, 192, 128, 32, 16, 64, 16)),
        draw_entries,
        work_of_entries,
    ),
    Subject(
        "compressed_attention.dense",
        (
            *(JointPacked(case, documents) for case in JOINT_CASES[2:4] for documents in (0.0, 15.0)),
            JointPacked(JointCase(1, 21, 3, 512, 4, 5, None)),
            JointPacked(JointCase(2, 40, 16, 32, 4, 9, None), 20.0),
        ),
        lambda tokens: JointPacked(JointCase(1, tokens, 64, 512, 128, 128, None)),
        draw_joint,
        work_of_joint,
        EXCUSED,
    ),
    Subject(
        "compressed_attention.selected",
        (
            JointPacked(JointCase(1, 4, 3, 16, 2, 3, 2)),
            JointPacked(JointCase(1, 9, 4, 16, 2, 4, 3), 5.0),
            JointPacked(JointCase(1, 11, 3, 32, 4, 3, 5)),
        ),
        lambda tokens: JointPacked(JointCase(1, tokens, 64, 512, 4, 128, 512)),
        draw_selected,
        work_of_selected,
        WIDE_NEWEST,
    ),
)
