"""Shapes of linear attention and the gated delta rule that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    rows: int
    tokens: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


SHAPES = (
    Shape(1, 1, 1, 1, 4, 4),
    Shape(2, 63, 2, 2, 8, 8),
    Shape(1, 64, 1, 2, 8, 16),
    Shape(2, 65, 2, 4, 16, 8),
    # Three chunks of 64, the last of four tokens; three value heads of a key head.
    Shape(1, 132, 1, 3, 16, 24),
)
