"""Compressors on drawn inputs; slots without a window are left out of the comparison."""

from kernels.compress.reference import (
    gated_compress_direct,
    mean_compress_direct,
    mlp_compress_direct,
)
from kernels.compress.shapes import SHAPES, Shape
from kernels.compress.triton import Tiles, gated_compress_triton, mean_compress_triton, mlp_compress_triton
from kernels.document_windows import document_windows
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec


def _tiles(factory: InputFactory) -> Tiles | None:
    return Tiles(4, 4, 3, 1) if factory.uses_small_tiles else None


def draw_mean(shape: Shape, factory: InputFactory) -> KernelCase:
    """Means of windows that may share tokens."""
    position = factory.documents(shape.rows, shape.tokens, 3.0 * shape.length)[1]
    windows = document_windows(position, shape.length, shape.stride)
    x = factory.normal(shape.rows, shape.tokens, shape.heads, shape.dim)
    return KernelCase(
        {"x": x},
        lambda x: (mean_compress_triton(x, windows, tiles=_tiles(factory)),),
        lambda x: (mean_compress_direct(x, windows),),
    )


def draw_mlp(shape: Shape, factory: InputFactory) -> KernelCase:
    """Perceptrons that are half as wide as what they read."""
    position = factory.documents(shape.rows, shape.tokens, 3.0 * shape.length)[1]
    windows = document_windows(position, shape.length, shape.stride)
    size = shape.length * shape.dim
    inner = max(1, size // 2)
    inputs = {
        "x": factory.normal(shape.rows, shape.tokens, shape.heads, shape.dim),
        "position_encoding": factory.normal(shape.heads, shape.length, shape.dim),
        "first": factory.normal(shape.heads, inner, size, scale=size**-0.5),
        "second": factory.normal(shape.heads, shape.dim, inner, scale=inner**-0.5),
    }
    return KernelCase(
        inputs,
        lambda x, position_encoding, first, second: (
            mlp_compress_triton(x, position_encoding, first, second, windows, tiles=_tiles(factory)),
        ),
        lambda x, position_encoding, first, second: (
            mlp_compress_direct(x, position_encoding, first, second, windows),
        ),
    )


def draw_gated(shape: Shape, factory: InputFactory, *, is_overlapping: bool = True) -> KernelCase:
    """Gated means of a part of wider channels."""
    position = factory.documents(shape.rows, shape.tokens, 3.0 * shape.length)[1]
    windows = document_windows(position, shape.length, shape.length)
    width = shape.dim * (1 + is_overlapping)
    inputs = {
        "values": factory.normal(shape.rows, shape.tokens, width + 1),
        "gates": factory.normal(shape.rows, shape.tokens, width, scale=2.0),
        "bias": factory.normal(shape.length, width),
    }
    options = {"position": position, "is_overlapping": is_overlapping}
    return KernelCase(
        inputs,
        lambda values, gates, bias: (
            gated_compress_triton(values[..., 1:], gates, bias, windows, **options, tiles=_tiles(factory)),
        ),
        lambda values, gates, bias: (
            gated_compress_direct(values[..., 1:], gates, bias, windows, **options),
        ),
    )


def draw_separate(shape: Shape, factory: InputFactory) -> KernelCase:
    """Gated means of windows without overlap."""
    return draw_gated(shape, factory, is_overlapping=False)


def cost(shape: Shape) -> KernelCost:
    """Bytes in bfloat16 of the tokens, and of their gradients; entries are few."""
    size = 2.0 * shape.rows * shape.tokens * shape.heads * shape.dim
    return KernelCost(0.0, size, 0.0, size)


def mlp_cost(shape: Shape) -> KernelCost:
    """The two products over all windows."""
    size, windows = shape.length * shape.dim, shape.rows * shape.tokens // shape.stride
    flops = 2.0 * windows * shape.heads * (size // 2) * (size + shape.dim)
    weights = 2.0 * shape.heads * (size // 2) * (size + shape.dim)
    moved = cost(shape).forward_bytes
    return KernelCost(flops, moved + weights, 2 * flops, moved + 2 * weights)


def gated_cost(shape: Shape) -> KernelCost:
    """Bytes in bfloat16 of values and gates, both parts; of these and their gradients."""
    size = 8.0 * shape.rows * shape.tokens * shape.dim
    return KernelCost(0.0, size, 0.0, 2 * size)


SPECS = (
    KernelSpec("compress.mean", SHAPES, lambda tokens: Shape(1, tokens, 4, 192, 32, 16), draw_mean, cost),
    KernelSpec("compress.mlp", SHAPES, lambda tokens: Shape(1, tokens, 4, 192, 32, 16), draw_mlp, mlp_cost),
    KernelSpec("compress.csa", SHAPES, lambda tokens: Shape(1, tokens, 1, 512, 4, 4), draw_gated, gated_cost),
    KernelSpec(
        "compress.hca", SHAPES, lambda tokens: Shape(1, tokens, 1, 512, 128, 128), draw_separate, gated_cost
    ),
)
