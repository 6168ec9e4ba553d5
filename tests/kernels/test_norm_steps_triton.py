"""A norm of more rows than there are programs: each of them walks over several blocks in backward."""

import pytest
import torch

import kernels.norm.triton
from kernels.spec import KernelSpec, input_factory, kernel_specs
from tests.closeness import assert_kernel

pytestmark = pytest.mark.interpreted
CALLS = [
    pytest.param(spec, shape, id=f"{spec.name}-{index}")
    for spec in kernel_specs("norm")
    for index, shape in enumerate(spec.shapes)
    if shape.rows > 6
]


@pytest.mark.parametrize("programs", [1, 8])
@pytest.mark.parametrize(("spec", "shape"), CALLS)
def test_gradients_are_summed_over_all_blocks_of_a_program(
    spec: KernelSpec, shape: object, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.norm.triton, "PARTIALS", programs)
    case = spec.draw(shape, input_factory(torch.float32, uses_small_tiles=True))
    assert_kernel(case, 1e-5)
