"""Shapes of the short convolution that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    rows: int
    tokens: int
    channels: int
    taps: int
    has_documents: bool = True
    has_bias: bool = False
    has_state: bool = False
    has_silu: bool = True


SHAPES = (
    Shape(1, 1, 3, 4),
    Shape(2, 3, 5, 4, has_bias=True),
    Shape(2, 17, 8, 4, has_documents=False),
    Shape(1, 9, 4, 1, has_silu=False),
    Shape(2, 9, 6, 3, has_bias=True, has_state=True),
    Shape(1, 2, 4, 4, has_documents=False, has_state=True, has_silu=False),
)
