"""A verdict names the output or gradient that is farthest from the truth, and lets no wrong kernel pass."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.spec import InputFactory, KernelCase, KernelCost, KernelSpec
from kernels.verdict import EXACT, check_on_gpu, worst_of

Kernel = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def truth(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return 2 * x, 3 * y


def off(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    # The second output is too large by a fifth and its gradient with it, the first one by a hundredth.
    return 2.02 * x, 3.6 * y


def nan_in_the_first(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (2 * x).masked_fill(x == x.max(), math.nan), 3 * y


def case_of(kernel: Kernel, factory: InputFactory | None = None) -> KernelCase:
    x, y = torch.linspace(-1, 2, 40), torch.linspace(3, 1, 7)
    dtype = torch.float32 if factory is None else factory.dtype
    return KernelCase({"x": x.to(dtype), "y": y.to(dtype)}, kernel, truth)


def spec_of(kernel: Kernel) -> KernelSpec:
    cost = KernelCost(1.0, 1.0, 1.0, 1.0)
    return KernelSpec("toy", (0,), lambda _: 0, lambda _, factory: case_of(kernel, factory), lambda _: cost)


@pytest.mark.parametrize("kernel", [truth, off])
def test_the_worst_of_all_outputs_and_gradients_is_named(kernel: Kernel) -> None:
    verdict = worst_of(case_of(kernel), "toy", torch.float32, 1e-5)
    assert verdict.is_right == (kernel is truth)
    if kernel is off:
        assert verdict.name in ("out1", "grad y")
        assert verdict.error == pytest.approx(0.2, rel=1e-5)


def test_beside_plain_torch_a_wrong_kernel_is_wrong_by_its_worst_part() -> None:
    verdict = check_on_gpu(spec_of(off), torch.device("cpu"))
    assert not verdict.is_right
    assert verdict.name in ("out1", "grad y")
    assert verdict.error == pytest.approx(0.2, rel=0.03)
    assert check_on_gpu(spec_of(truth), torch.device("cpu")).is_right


def test_an_error_that_is_no_number_is_the_worst_there_is() -> None:
    for verdict in (
        worst_of(case_of(nan_in_the_first), "toy", torch.float32, 1.0),
        check_on_gpu(spec_of(nan_in_the_first), torch.device("cpu")),
    ):
        assert verdict.name == "out0"
        assert not verdict.is_right
    # Plain torch in bfloat16 is off by less than what is always right.
    assert check_on_gpu(spec_of(truth), torch.device("cpu")).limit == EXACT[torch.bfloat16]
