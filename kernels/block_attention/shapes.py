"""Shapes of attention over selected blocks that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call; `selectors` is the number of heads that select."""

    rows: int
    tokens: int
    heads: int
    key_heads: int
    selectors: int
    key_dim: int
    value_dim: int
    block: int
    chosen: int


SHAPES = (
    Shape(1, 1, 1, 1, 1, 4, 4, 4, 2),
    Shape(2, 17, 4, 2, 2, 8, 8, 4, 1),
    Shape(2, 33, 6, 2, 6, 8, 4, 3, 4),
    Shape(1, 64, 4, 4, 4, 8, 12, 16, 2),
    Shape(1, 100, 4, 1, 1, 16, 16, 8, 12),
)
