"""The linear cross entropy on drawn inputs."""

from kernels.cross_entropy import IGNORED
from kernels.cross_entropy.reference import linear_cross_entropy_direct
from kernels.cross_entropy.shapes import SHAPES, Shape
from kernels.cross_entropy.triton import Tiles, linear_cross_entropy_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec

# The interpreter takes a token at a time.
SMALL_SHAPES = tuple(shape for shape in SHAPES if shape.tokens < 100)


def draw(shape: Shape, factory: InputFactory) -> KernelCase:
    """About every fourth target is ignored."""
    x = factory.normal(shape.tokens, shape.width)
    weight = factory.normal(shape.vocabulary, shape.width)
    targets = factory.integers(shape.tokens, low=0, high=shape.vocabulary)
    targets = targets.masked_fill(factory.integers(shape.tokens, low=0, high=4) == 0, IGNORED)
    tiles = Tiles(5, 16, 1) if factory.uses_small_tiles else None
    return KernelCase(
        {"x": x, "weight": weight},
        lambda x, weight: linear_cross_entropy_triton(x, weight, targets, shape.form, tiles=tiles),
        lambda x, weight: linear_cross_entropy_direct(x, weight, targets, shape.form),
    )


def cost(shape: Shape) -> KernelCost:
    """Forward and both gradients are one pass; bytes in bfloat16, of the weight's gradient in float32."""
    numbers = shape.tokens * shape.width
    weights = shape.vocabulary * shape.width
    flops = 6.0 * shape.tokens * shape.width * shape.vocabulary
    return KernelCost(
        flops, 2.0 * (2 * numbers + weights) + 4.0 * weights, 0.0, 4.0 * numbers + 6.0 * weights
    )


SPECS = (KernelSpec("cross_entropy", SMALL_SHAPES, lambda tokens: Shape(tokens, 4096, 129280), draw, cost),)
