"""Shapes of the routed experts that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    tokens: int
    width: int
    experts: int
    top_k: int
    hidden: int


SHAPES = (Shape(1, 16, 4, 1, 16), Shape(33, 16, 8, 3, 16), Shape(64, 32, 4, 4, 16), Shape(7, 16, 32, 2, 32))
