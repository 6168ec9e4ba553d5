"""Shapes of the activations that tests, checks and benchmarks run."""

from typing import NamedTuple

from kernels.activation.reference import Kind


class Shape(NamedTuple):
    """Sizes and options of one call."""

    rows: int
    hidden: int
    kind: Kind
    limit: float | None
    clamps_product: bool


SHAPES = (
    Shape(1, 1, "swiglu", None, False),
    Shape(17, 24, "swiglu", 0.5, False),
    Shape(17, 24, "swiglu", 0.5, True),
    Shape(5, 16, "geglu", None, False),
    Shape(17, 24, "shifted_swiglu", 0.7, False),
    Shape(17, 24, "relu2", None, False),
)
