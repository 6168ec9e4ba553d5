"""Shapes of attention that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    rows: int
    tokens: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    window: int | None


SHAPES = (
    Shape(1, 1, 1, 1, 4, 4, None),
    Shape(2, 17, 4, 2, 8, 8, None),
    Shape(2, 33, 6, 2, 16, 8, 5),
    Shape(1, 64, 4, 4, 8, 12, 1),
    Shape(1, 130, 4, 1, 16, 16, 200),
    Shape(2, 150, 4, 2, 8, 6, 40),
    Shape(1, 65, 3, 1, 96, 80, None),
    Shape(1, 63, 2, 2, 192, 128, None),
)
