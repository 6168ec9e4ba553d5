"""The choice of blocks on drawn inputs."""

from kernels.block_selection.reference import select_by_max_direct
from kernels.block_selection.shapes import SHAPES, Shape
from kernels.block_selection.triton import Tiles, select_by_max_triton
from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec


def draw(shape: Shape, factory: InputFactory) -> KernelCase:
    """Small whole numbers: their scores are exact and often equal, so that ties count."""
    position = factory.documents(shape.rows, shape.tokens, 4.0 * shape.block)[1]
    numbers = {"low": -2, "high": 3, "dtype": factory.dtype}
    inputs = {
        "q": factory.integers(shape.rows, shape.tokens, shape.heads, shape.dim, **numbers),
        "k": factory.integers(shape.rows, shape.tokens, 1, shape.dim, **numbers),
    }
    options = {"block": shape.block, "count": shape.chosen, "local": shape.local, "position": position}
    tiles = Tiles(16, 16, 32, 1) if factory.uses_small_tiles else None

    def known(chosen, peaks):
        # In order of slots: blocks that go first are equals. The best key of no block may be any token.
        chosen, order = chosen.sort(dim=-1)
        far = peaks[..., 1:].gather(-1, order).masked_fill(chosen < 0, -1)
        return chosen, peaks[..., :1], far

    return KernelCase(
        inputs,
        lambda q, k: known(*select_by_max_triton(q, k, **options, tiles=tiles)),
        lambda q, k: known(*select_by_max_direct(q, k, **options)),
    )


def cost(shape: Shape) -> KernelCost:
    """Products of all causal pairs; bytes in bfloat16 of the queries."""
    pairs = shape.rows * shape.tokens**2 / 2
    return KernelCost(
        2.0 * pairs * shape.heads * shape.dim, 2.0 * shape.tokens * shape.heads * shape.dim, 0.0, 0.0
    )


SPECS = (
    KernelSpec(
        "block_selection.max", SHAPES, lambda tokens: Shape(1, tokens, 4, 1, 128, 128, 16, 1), draw, cost
    ),
)
