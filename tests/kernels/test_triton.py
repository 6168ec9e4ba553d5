"""Every Triton kernel in the interpreter against its reference in float64: outputs and all gradients."""

import math

import pytest
import torch
from torch import Tensor

from kernels.spec import KernelSpec, input_factory, kernel_specs
from tests.closeness import assert_kernel

pytestmark = [pytest.mark.interpreted]

# Specs that differ in the dims of a model alone draw the same small cases.
CASES = {
    (spec.draw, shape): (spec, index)
    for spec in reversed(kernel_specs())
    for index, shape in enumerate(spec.shapes)
}
CALLS = [
    pytest.param(spec, spec.shapes[index], id=f"{spec.name}-{index}")
    for spec, index in reversed(CASES.values())
]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def with_gaps(x: Tensor) -> Tensor:
    """The same numbers with others between them, which nothing may read."""
    wide = x.new_full((*x.shape, 2), math.nan if x.is_floating_point() else 2**30)
    return wide[..., 1].copy_(x)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("spec", "shape"), CALLS)
def test_kernel_equals_its_reference(spec: KernelSpec, shape: object, dtype: torch.dtype) -> None:
    case = spec.draw(shape, input_factory(dtype, uses_small_tiles=True))
    if spec.shapes.index(shape) % 2:
        case = case._replace(inputs={name: with_gaps(x) for name, x in case.inputs.items()})
    assert_kernel(case, LIMITS[dtype])
