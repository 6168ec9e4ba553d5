"""Shapes of Sinkhorn-Knopp that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    matrices: int
    streams: int
    iterations: int


SHAPES = (Shape(1, 1, 1), Shape(3, 2, 4), Shape(17, 4, 20), Shape(5, 3, 7))
