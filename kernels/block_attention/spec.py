"""Attention over selected blocks on drawn inputs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.block_attention.reference import block_attention_direct
from kernels.block_attention.shapes import SHAPES, Shape
from kernels.block_attention.triton import Tile, Tiles, block_attention_triton
from kernels.document_windows import document_windows
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec, Outputs


class Packed(NamedTuple):
    """A shape, and the mean length of packed documents; 0 for one document in each row."""

    shape: Shape
    mean: float = 0.0


# Several tiles of queries and keys, several chunks and parts of lists in few tokens.
_TILE = Tile(32, 16, 1, 1)
SMALL = Tiles(_TILE, _TILE, _TILE, _TILE, _TILE, _TILE, 2, 1 << 16)


def draw(packed: Packed, factory: InputFactory) -> KernelCase:
    """Queries choose at random among the blocks before their own."""
    shape = packed.shape
    rows, tokens, heads, key_heads, selectors, key_dim, value_dim, block, chosen = shape
    position = torch.arange(tokens, device=factory.device).expand(rows, -1)
    if packed.mean:
        _, position = factory.documents(rows, tokens, packed.mean)
    inputs = {
        "q": factory.normal(rows, tokens, heads, key_dim),
        "k": factory.normal(rows, tokens, key_heads, key_dim),
        "v": factory.normal(rows, tokens, key_heads, value_dim),
    }
    windows = document_windows(position, block, block)
    slots = windows.start.shape[1]
    if factory.device.type == "meta":
        selected = torch.empty(rows, tokens, selectors, min(chosen, slots), dtype=torch.int64, device="meta")
    else:
        selected = windows.choose(factory.uniform(rows, tokens, selectors, slots), position, count=chosen)
    tiles = SMALL if factory.uses_small_tiles else None

    def run(form: Callable[..., Outputs], q: Tensor, k: Tensor, v: Tensor, **more: Tiles | None) -> Outputs:
        chosen, own_position = selected.to(q.device), position.to(q.device)
        return form(q, k, v, chosen, scale=key_dim**-0.5, block=block, position=own_position, **more)

    return KernelCase(
        inputs,
        lambda q, k, v: run(block_attention_triton, q, k, v, tiles=tiles),
        lambda q, k, v: run(block_attention_direct, q, k, v),
    )


def cost(packed: Packed) -> KernelCost:
    """Products of scores and outputs over the keys seen; five in backward. Bytes of bfloat16 numbers."""
    shape = packed.shape
    seen = shape.block / 2 + shape.chosen * shape.block
    pairs = shape.rows * shape.tokens * shape.heads * seen
    flops = 2.0 * pairs * (shape.key_dim + shape.value_dim)
    wide = shape.heads + shape.key_heads
    numbers = 2.0 * shape.rows * shape.tokens * wide * (shape.key_dim + shape.value_dim)
    backward = 2.0 * pairs * (3 * shape.key_dim + 2 * shape.value_dim)
    return KernelCost(flops, numbers, backward, 2 * numbers)


def at_nsa(tokens: int) -> Packed:
    """The native sparse attention of a model of 27 B parameters."""
    return Packed(Shape(1, tokens, 64, 4, 4, 192, 128, 64, 15))


def at_moba(tokens: int) -> Packed:
    """Mixture of block attention as in Llama 8B at a million tokens, whose heads choose for themselves."""
    return Packed(Shape(1, tokens, 32, 32, 32, 128, 128, 512, 2))


def at_msa(tokens: int) -> Packed:
    """MiniMax-M3."""
    return Packed(Shape(1, tokens, 64, 4, 4, 128, 128, 128, 15))


SPECS = (
    KernelSpec(
        "block_attention.nsa",
        (*(Packed(shape) for shape in SHAPES), Packed(Shape(2, 45, 6, 2, 2, 24, 20, 4, 3), 11.0)),
        at_nsa,
        draw,
        cost,
    ),
    KernelSpec(
        "block_attention.moba",
        (
            Packed(Shape(1, 96, 4, 2, 4, 16, 16, 24, 2)),
            Packed(Shape(2, 100, 3, 3, 3, 16, 32, 20, 2), 40.0),
        ),
        at_moba,
        draw,
        cost,
    ),
    KernelSpec(
        "block_attention.msa",
        (Packed(Shape(1, 70, 8, 1, 1, 32, 16, 16, 3), 30.0), Packed(Shape(1, 40, 16, 1, 1, 16, 16, 8, 2))),
        at_msa,
        draw,
        cost,
    ),
)
