"""Sinkhorn-Knopp on drawn inputs."""

from kernels.sinkhorn.reference import sinkhorn_iterated
from kernels.sinkhorn.shapes import SHAPES, Shape
from kernels.sinkhorn.triton import Tiles, sinkhorn_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec

EPS = 1e-6


def draw(shape: Shape, factory: InputFactory) -> KernelCase:
    """Matrices far from doubly stochastic."""
    logits = factory.normal(shape.matrices, shape.streams, shape.streams, scale=2.0)
    options = {"iterations": shape.iterations, "eps": EPS}
    tiles = Tiles(4, 1) if factory.uses_small_tiles else None
    return KernelCase(
        {"logits": logits},
        lambda logits: (sinkhorn_triton(logits, **options, tiles=tiles),),
        lambda logits: (sinkhorn_iterated(logits, **options),),
    )


def cost(shape: Shape) -> KernelCost:
    """Bytes in float32 of the matrices: in and out; in, their gradients in and out."""
    size = 4.0 * shape.matrices * shape.streams**2
    return KernelCost(0.0, 2 * size, 0.0, 3 * size)


SPECS = (KernelSpec("sinkhorn", SHAPES, lambda tokens: Shape(tokens, 4, 20), draw, cost),)
