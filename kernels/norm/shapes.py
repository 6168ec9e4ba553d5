"""Shapes of the norms that tests, checks and benchmarks run."""

from typing import NamedTuple

from kernels.norm.reference import Gate


class Shape(NamedTuple):
    """Sizes and options of one call."""

    rows: int
    width: int
    is_zero_centered: bool = False


class GatedShape(NamedTuple):
    """Sizes and options of one call of the gated norm: rows of `heads` heads."""

    rows: int
    heads: int
    width: int
    kind: Gate
    gates_first: bool


SHAPES = (Shape(1, 2), Shape(3, 5, True), Shape(17, 64), Shape(2, 1000, True), Shape(5, 3), Shape(33, 24))
GATED_SHAPES = (
    GatedShape(1, 1, 4, "silu", False),
    GatedShape(7, 3, 24, "sigmoid", False),
    GatedShape(5, 2, 16, "silu", True),
    GatedShape(9, 4, 5, "sigmoid", True),
)
