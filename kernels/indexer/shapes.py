"""Shapes of the indexer that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call."""

    rows: int
    tokens: int
    index_heads: int
    index_dim: int
    heads: int
    key_dim: int
    top_k: int
    pools: bool = False


SHAPES = (
    Shape(1, 1, 1, 4, 1, 4, 1),
    Shape(2, 17, 2, 8, 3, 6, 4),
    Shape(2, 40, 4, 4, 2, 8, 7, pools=True),
    Shape(1, 65, 3, 8, 4, 8, 100),
)
