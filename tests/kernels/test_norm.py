import pytest
import torch

from kernels.norm import rms_norm
from kernels.norm.reference import rms_norm_direct
from kernels.norm.shapes import SHAPES, Shape
from tests.closeness import assert_close, outputs_and_grads


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_equals_the_direct_form(shape: Shape, scale: float) -> None:
    x = torch.randn(2, *shape[:2], dtype=torch.float64) * scale
    weight = torch.randn(shape.width, dtype=torch.float64)
    ours = outputs_and_grads(lambda *a: rms_norm(*a, 1e-6), [x, weight])
    assert_close(ours, outputs_and_grads(lambda *a: rms_norm_direct(*a, 1e-6), [x, weight]), 1e-11)


def test_bfloat16_is_computed_in_float32() -> None:
    x, weight = torch.randn(64, 256, dtype=torch.bfloat16), torch.randn(256)
    ours = rms_norm(x, weight, 1e-6)
    assert ours.dtype == torch.bfloat16
    exact = rms_norm_direct(x.double(), weight.double(), 1e-6)
    # bfloat16 keeps eight bits: one rounding of the exact result is all that it may be off.
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_a_zero_row_stays_zero_with_finite_gradients() -> None:
    x, weight = torch.zeros(2, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    out, grad_x, grad_weight = outputs_and_grads(lambda *a: rms_norm(*a, 1e-6), [x, weight])
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isfinite(grad_x).all()
    assert torch.equal(grad_weight, torch.zeros_like(grad_weight))
