"""Shapes of the linear cross entropy that tests, checks and benchmarks run."""

from typing import NamedTuple

from kernels.cross_entropy.reference import PLAIN, LossOptions


class Shape(NamedTuple):
    """Sizes and options of one call."""

    tokens: int
    width: int
    vocabulary: int
    form: LossOptions = PLAIN


SHAPES = (
    Shape(1, 4, 2),
    Shape(17, 8, 33),
    Shape(513, 8, 40),
    Shape(9, 8, 65, LossOptions(cap=3.0)),
    Shape(12, 16, 50, LossOptions(z=0.1)),
    Shape(7, 8, 20, LossOptions(cap=5.0, z=0.02)),
    Shape(3, 4, 1),
)
