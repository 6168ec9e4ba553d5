"""Shapes of rotary positions that tests, checks and benchmarks run."""

from typing import NamedTuple

from kernels.rotary.reference import RotaryLayout


class Shape(NamedTuple):
    """Sizes and options of one call; `turned` of the `dim` dims are turned."""

    rows: int
    tokens: int
    heads: int
    dim: int
    turned: int
    layout: RotaryLayout
    on_last: bool


SHAPES = (
    Shape(1, 1, 1, 2, 2, "half_split", False),
    Shape(2, 5, 3, 8, 8, "interleaved", False),
    Shape(1, 7, 2, 12, 4, "half_split", True),
    Shape(2, 3, 5, 10, 6, "interleaved", True),
    Shape(1, 9, 4, 16, 6, "half_split", False),
)
