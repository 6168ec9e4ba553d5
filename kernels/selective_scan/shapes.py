"""Shapes of the selective scan that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    rows: int
    tokens: int
    channels: int
    state_dim: int


SHAPES = (Shape(1, 1, 2, 3), Shape(2, 15, 4, 2), Shape(1, 16, 3, 4), Shape(2, 17, 6, 4), Shape(1, 100, 5, 8))
