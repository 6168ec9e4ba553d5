"""Shapes of the compressors that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    rows: int
    tokens: int
    heads: int
    dim: int
    length: int
    stride: int


SHAPES = (
    Shape(1, 1, 1, 4, 2, 1),
    Shape(2, 17, 2, 3, 4, 2),
    Shape(1, 40, 1, 5, 3, 3),
    Shape(2, 50, 3, 4, 6, 2),
)
