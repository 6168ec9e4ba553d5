"""Rotary positions on drawn inputs."""

from kernels.rotary.reference import rotate_direct
from kernels.rotary.shapes import SHAPES, Shape
from kernels.rotary.triton import Tiles, rotate_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec


def draw(shape: Shape, factory: InputFactory) -> KernelCase:
    """Heads that are a part of wider ones, turned by any angles."""
    x = factory.normal(shape.rows, shape.tokens, shape.heads, shape.dim + 1)
    angles = factory.uniform(shape.rows, shape.tokens, shape.turned // 2, high=6.3)
    cos, sin = angles.cos(), angles.sin()
    tiles = Tiles(2, 1) if factory.uses_small_tiles else None
    return KernelCase(
        {"x": x},
        lambda x: (rotate_triton(x[..., 1:], cos, sin, shape.layout, on_last=shape.on_last, tiles=tiles),),
        lambda x: (rotate_direct(x[..., 1:], cos, sin, shape.layout, on_last=shape.on_last),),
    )


def cost(shape: Shape) -> KernelCost:
    """Bytes in bfloat16 of x and its like, each way, and the tables in float32."""
    size = 2.0 * shape.rows * shape.tokens * shape.heads * shape.dim
    tables = 4.0 * shape.rows * shape.tokens * shape.turned
    return KernelCost(0.0, 2 * size + tables, 0.0, 2 * size + tables)


SPECS = (
    KernelSpec(
        "rotary", SHAPES, lambda tokens: Shape(1, tokens, 32, 128, 128, "half_split", False), draw, cost
    ),
    KernelSpec(
        "rotary.last",
        (),
        lambda tokens: Shape(1, tokens, 64, 512, 64, "interleaved", True),
        draw,
        cost,
    ),
)
