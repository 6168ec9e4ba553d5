"""Shapes of attention over selected keys that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call; with `is_shared` values are the first part of the keys."""

    rows: int
    tokens: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    chosen: int
    keys: int | None = None
    is_shared: bool = False
    has_sinks: bool = False


SHAPES = (
    Shape(1, 1, 1, 1, 4, 4, 1),
    Shape(2, 17, 4, 1, 8, 6, 5),
    Shape(2, 33, 6, 2, 5, 8, 12, has_sinks=True),
    Shape(1, 70, 4, 4, 8, 8, 100),
    Shape(1, 9, 3, 1, 24, 16, 7, is_shared=True, has_sinks=True),
    Shape(2, 6, 20, 1, 16, 16, 40, keys=30, is_shared=True),
)
