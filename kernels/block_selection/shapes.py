"""Shapes of block selection that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    rows: int
    tokens: int
    heads: int
    key_heads: int
    dim: int
    block: int
    chosen: int
    local: int


SHAPES = (
    Shape(1, 1, 1, 1, 4, 4, 2, 1),
    Shape(2, 17, 4, 2, 8, 4, 1, 1),
    Shape(2, 33, 6, 2, 4, 3, 4, 2),
    Shape(1, 130, 4, 1, 16, 8, 5, 3),
)
