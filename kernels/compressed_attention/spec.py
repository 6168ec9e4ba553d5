"""Attention over compressed entries on drawn inputs: with a choice of blocks, and joined with a window."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention.triton import Tile, Tiles
from kernels.compressed_attention.entries import entry_attention_direct
from kernels.compressed_attention.joint import joint_attention_direct
from kernels.compressed_attention.shapes import JOINT_SHAPES, SHAPES, JointShape, Shape
from kernels.compressed_attention.triton import (
    CHUNK_ELEMENTS,
    entry_attention_triton,
    joint_attention_triton,
    select_by_entries_triton,
)
from kernels.compressed_attention.triton_selected import joint_selected_triton
from kernels.document_windows import document_windows
from kernels.selected_attention.spec import WIDE_NEWEST
from kernels.selected_attention.triton import Tiles as SelectedTiles
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec, Outputs

SMALL = Tiles(Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), programs=3)
SMALL_MASS = Tile(16, 16, 1, 1)


class Packed(NamedTuple):
    """A shape, and the mean length of its documents; 0 for one in each row."""

    shape: Shape
    documents: float = 0.0


class JointPacked(NamedTuple):
    """The same of the joint attention."""

    shape: JointShape
    documents: float = 0.0


def _positions(factory: InputFactory, rows: int, tokens: int, documents: float) -> Tensor:
    if documents:
        return factory.documents(rows, tokens, documents)[1]
    return torch.arange(tokens, device=factory.device).expand(rows, -1)


def draw_entries(packed: Packed, factory: InputFactory) -> KernelCase:
    """Outputs, the chosen blocks in order of slots, and the same from the choice alone."""
    shape = packed.shape
    position = _positions(factory, shape.rows, shape.tokens, packed.documents)
    entries = document_windows(position, shape.length, shape.stride)
    size = (shape.rows, entries.start.shape[1], shape.key_heads)
    inputs = {
        "q": factory.normal(shape.rows, shape.tokens, shape.heads, shape.key_dim),
        "k": factory.normal(*size, shape.key_dim),
        "v": factory.normal(*size, shape.value_dim),
    }
    options: dict[str, Any] = {
        "entries": entries,
        "blocks": document_windows(position, shape.block, shape.block),
        "position": position,
        "scale": shape.key_dim**-0.5,
        "choice": {"count": shape.chosen, "initial": 1, "local": 1},
    }
    small: dict[str, Any] = {}
    if factory.uses_small_tiles:
        small = {"tiles": SMALL, "tile": SMALL_MASS, "chunk": min(CHUNK_ELEMENTS, 500)}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        out, chosen = entry_attention_triton(q, k, v, **options, **small)
        alone = select_by_entries_triton(q, k, **options, **small)
        return out, chosen.sort(-1).values, alone.sort(-1).values

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        out, chosen = entry_attention_direct(q, k, v, **options)
        chosen = chosen.sort(-1).values
        # Inputs that no query sees have gradients of zero, too.
        return out + 0 * (q.sum() + k.sum() + v.sum()), chosen, chosen

    return KernelCase(inputs, ours, reference)


def draw_joint(packed: JointPacked, factory: InputFactory) -> KernelCase:
    """Outputs, and an empty share of a selection."""
    shape = packed.shape
    position = _positions(factory, shape.rows, shape.tokens, packed.documents)
    windows = document_windows(position, shape.length, shape.length)
    inputs = {
        "q": factory.normal(shape.rows, shape.tokens, shape.heads, shape.dim),
        "kv": factory.normal(shape.rows, shape.tokens, shape.dim),
        "entries": factory.normal(shape.rows, windows.start.shape[1], shape.dim),
        "sinks": factory.uniform(shape.heads, low=-2.0, high=2.0),
    }
    options: dict[str, Any] = {"windows": windows, "position": position, "scale": shape.dim**-0.5}
    options |= {"window": shape.window}
    tiles = SMALL if factory.uses_small_tiles else None

    def ours(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> Outputs:
        return joint_attention_triton(q, kv, entries, sinks, **options, tiles=tiles)

    def reference(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> Outputs:
        out, mass = joint_attention_direct(q, kv, entries, sinks, None, **options)
        return out + 0 * entries.sum(), mass

    return KernelCase(inputs, ours, reference)


def draw_selected(packed: JointPacked, factory: InputFactory) -> KernelCase:
    """A window joined with entries that each query chose at random among those that it sees."""
    shape = packed.shape
    position = _positions(factory, shape.rows, shape.tokens, packed.documents)
    windows = document_windows(position, shape.length, shape.length)
    slots = windows.start.shape[1]
    count = min(shape.chosen or 1, slots)
    scores = factory.uniform(shape.rows, shape.tokens, slots).masked_fill(~windows.is_seen(position), -1.0)
    best = scores.topk(count, dim=-1)
    selected = torch.where(best.values < 0, -1, best.indices)
    inputs = {
        "q": factory.normal(shape.rows, shape.tokens, shape.heads, shape.dim),
        "kv": factory.normal(shape.rows, shape.tokens, shape.dim),
        "entries": factory.normal(shape.rows, slots, shape.dim),
        "sinks": factory.uniform(shape.heads, low=-2.0, high=2.0),
    }
    options: dict[str, Any] = {"position": position, "scale": shape.dim**-0.5, "window": shape.window}
    tiles = SelectedTiles(16, 16, 1, 1) if factory.uses_small_tiles else None

    def ours(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> Outputs:
        more = {"is_deterministic": False, "tiles": tiles}
        return joint_selected_triton(q, kv, entries, sinks, selected, **options, **more)

    def reference(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> Outputs:
        out, mass = joint_attention_direct(q, kv, entries, sinks, selected, windows=windows, **options)
        return out + 0 * entries.sum(), mass

    return KernelCase(inputs, ours, reference)


def cost_of_selected(packed: JointPacked) -> KernelCost:
    """Two products of all pairs forward, five backward."""
    shape = packed.shape
    pairs = float(shape.rows * shape.tokens * (shape.window + (shape.chosen or 0)))
    queries = 2.0 * shape.rows * shape.tokens * shape.heads * shape.dim
    keys = 2.0 * shape.rows * (shape.tokens + shape.tokens // shape.length) * shape.dim
    flops = 4.0 * shape.heads * shape.dim * pairs
    return KernelCost(flops, 2 * queries + keys, 2.5 * flops, 4 * queries + 2 * keys)


def _entry_pairs(tokens: int, length: int, stride: int) -> float:
    # Pairs of a query and an entry that it sees, in one document.
    return max(0, tokens - length) ** 2 / (2 * stride)


def cost_of_entries(packed: Packed) -> KernelCost:
    """Scores and values, and the scores again for the choice; as much for the choice alone. Backward five."""
    shape = packed.shape
    seen = 2.0 * shape.rows * shape.heads * _entry_pairs(shape.tokens, shape.length, shape.stride)
    slots = shape.tokens // shape.stride
    read = shape.tokens * shape.heads * shape.key_dim
    read += slots * shape.key_heads * (shape.key_dim + shape.value_dim)
    read, out = 2.0 * shape.rows * read, 2.0 * shape.rows * shape.tokens * shape.heads * shape.value_dim
    chosen = 8.0 * shape.rows * shape.tokens * shape.key_heads * shape.chosen
    forward = seen * (shape.key_dim * 4 + shape.value_dim)
    backward = seen * (3 * shape.key_dim + 2 * shape.value_dim)
    return KernelCost(forward, 2 * read + out + 2 * chosen, backward, 2 * read + 2 * out)


def cost_of_joint(packed: JointPacked) -> KernelCost:
    """Two products of all pairs forward, five backward."""
    shape = packed.shape
    near = shape.window * shape.tokens - shape.window * (shape.window - 1) / 2
    pairs = near + _entry_pairs(shape.tokens, shape.length, shape.length)
    flops = 4.0 * shape.rows * shape.heads * shape.dim * pairs
    queries = 2.0 * shape.rows * shape.tokens * shape.heads * shape.dim
    keys = 2.0 * shape.rows * (shape.tokens + shape.tokens // shape.length) * shape.dim
    return KernelCost(flops, 2 * queries + keys, 2.5 * flops, 4 * queries + 2 * keys)


# A sum of 64 rows and 256 columns takes half of the registers; operands of 512 columns have many addresses.
KNOWN_SPILLS = {
    "attention_backward_queries": "50 reloads for the 66 products of a tile: addresses of operands",
    "attention_backward_keys": "reloads outside its loops, and a few for the 68 products of a tile",
}
SPECS = (
    KernelSpec(
        "compressed_attention.entries",
        (
            *(Packed(shape, documents) for shape in SHAPES for documents in (0.0, 15.0)),
            Packed(Shape(1, 40, 6, 2, 24, 80, 4, 2, 8, 2), 20.0),
        ),
        lambda tokens: Packed(Shape(1, tokens, 64, 4, 192, 128, 32, 16, 64, 16)),
        draw_entries,
        cost_of_entries,
    ),
    KernelSpec(
        "compressed_attention.dense",
        (
            *(JointPacked(shape, documents) for shape in JOINT_SHAPES[2:4] for documents in (0.0, 15.0)),
            JointPacked(JointShape(1, 21, 3, 512, 4, 5, None)),
            JointPacked(JointShape(2, 40, 16, 32, 4, 9, None), 20.0),
        ),
        lambda tokens: JointPacked(JointShape(1, tokens, 64, 512, 128, 128, None)),
        draw_joint,
        cost_of_joint,
        KNOWN_SPILLS,
    ),
    KernelSpec(
        "compressed_attention.selected",
        (
            JointPacked(JointShape(1, 4, 3, 16, 2, 3, 2)),
            JointPacked(JointShape(1, 9, 4, 16, 2, 4, 3), 5.0),
            JointPacked(JointShape(1, 11, 3, 32, 4, 3, 5)),
        ),
        lambda tokens: JointPacked(JointShape(1, tokens, 64, 512, 4, 128, 512)),
        draw_selected,
        cost_of_selected,
        WIDE_NEWEST,
    ),
)
