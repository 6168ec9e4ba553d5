"""Activations on drawn inputs."""

from kernels.activation import is_gated
from kernels.activation.reference import activate_direct
from kernels.activation.shapes import SHAPES, Shape
from kernels.activation.triton import Tiles, activate_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec


def draw(shape: Shape, factory: InputFactory) -> KernelCase:
    """Gates and ups on both sides of the limit."""
    factors = 2 if is_gated(shape.kind) else 1
    hidden = factory.normal(shape.rows, factors * shape.hidden, scale=2.0)
    options = {"limit": shape.limit, "clamps_product": shape.clamps_product}
    tiles = Tiles(2, 16, 1) if factory.uses_small_tiles else None
    return KernelCase(
        {"hidden": hidden},
        lambda hidden: (activate_triton(hidden, shape.kind, **options, tiles=tiles),),
        lambda hidden: (activate_direct(hidden, shape.kind, **options),),
    )


def cost(shape: Shape) -> KernelCost:
    """Bytes in bfloat16: gates, ups and results; gates, ups, and the gradients of all three."""
    size, factors = 2.0 * shape.rows * shape.hidden, 2 if is_gated(shape.kind) else 1
    return KernelCost(0.0, (factors + 1) * size, 0.0, (2 * factors + 1) * size)


SPECS = (
    KernelSpec("activation", SHAPES, lambda tokens: Shape(tokens, 4096, "swiglu", None, False), draw, cost),
)
