"""Shapes of attention over compressed entries that tests, checks and benchmarks run."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one call: entries of `length` tokens each `stride`."""

    rows: int
    tokens: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    length: int
    stride: int
    block: int
    chosen: int


SHAPES = (
    Shape(1, 1, 1, 1, 4, 4, 2, 2, 4, 2),
    Shape(2, 17, 4, 2, 8, 6, 4, 2, 4, 3),
    Shape(1, 31, 6, 2, 4, 4, 3, 3, 3, 4),
    Shape(1, 44, 4, 1, 8, 8, 4, 2, 8, 3),
    Shape(1, 50, 2, 1, 8, 8, 6, 2, 4, 5),
)


class JointShape(NamedTuple):
    """Sizes of one call of the joint attention; `chosen` of None reads all entries."""

    rows: int
    tokens: int
    heads: int
    dim: int
    length: int
    window: int
    chosen: int | None


JOINT_SHAPES = (
    JointShape(1, 1, 1, 4, 2, 3, 2),
    JointShape(2, 17, 4, 6, 2, 4, 3),
    JointShape(2, 33, 3, 4, 3, 1, None),
    JointShape(1, 50, 2, 8, 16, 70, None),
    JointShape(1, 70, 4, 8, 4, 9, 5),
)
