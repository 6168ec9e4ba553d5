"""The short convolution on drawn inputs."""

from kernels.convolution.reference import convolution_direct
from kernels.convolution.shapes import SHAPES, Shape
from kernels.convolution.triton import Tiles, short_convolution_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec


def draw(shape: Shape, factory: InputFactory) -> KernelCase:
    """A part of wider channels, with documents of a few tokens."""
    taps = shape.taps
    inputs = {
        "x": factory.normal(shape.rows, shape.tokens, shape.channels + 2),
        "weight": factory.normal(shape.channels, taps),
    }
    if shape.has_bias:
        inputs["bias"] = factory.normal(shape.channels)
    if shape.has_state:
        inputs["initial_state"] = factory.normal(shape.rows, taps - 1, shape.channels)
    document = factory.documents(shape.rows, shape.tokens, 4.0)[0] if shape.has_documents else None
    tiles = Tiles(4, 4, 1) if factory.uses_small_tiles else None
    options = {"document": document, "has_silu": shape.has_silu}

    def ours(x, weight, bias=None, initial_state=None):
        return (
            short_convolution_triton(
                x[..., 1:-1], weight, bias, initial_state=initial_state, tiles=tiles, **options
            ),
        )

    def reference(x, weight, bias=None, initial_state=None):
        return (convolution_direct(x[..., 1:-1], weight, bias, initial_state=initial_state, **options),)

    return KernelCase(inputs, ours, reference)


def cost(shape: Shape) -> KernelCost:
    """Bytes in bfloat16: x and y; x, dy and dx."""
    size = 2.0 * shape.rows * shape.tokens * shape.channels
    return KernelCost(0.0, 2 * size, 0.0, 3 * size)


SPECS = (KernelSpec("convolution", SHAPES, lambda tokens: Shape(1, tokens, 8192, 4), draw, cost),)
