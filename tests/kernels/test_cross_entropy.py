import pytest
import torch

from kernels.cross_entropy import IGNORED, linear_cross_entropy
from kernels.cross_entropy.reference import linear_cross_entropy_direct
from kernels.cross_entropy.shapes import SHAPES, Shape
from tests.closeness import assert_close, outputs_and_grads


def inputs_of(shape: Shape, ignored: float, scale: float) -> list[torch.Tensor]:
    x = torch.randn(shape.tokens, shape.width, dtype=torch.float64) * scale
    weight = torch.randn(shape.vocabulary, shape.width, dtype=torch.float64)
    targets = torch.randint(shape.vocabulary, (shape.tokens,))
    targets[torch.rand(shape.tokens) < ignored] = IGNORED
    return [x, weight, targets]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_fused_equals_direct(shape: Shape, ignored: float, scale: float) -> None:
    inputs = inputs_of(shape, ignored, scale)
    ours = outputs_and_grads(lambda *x: linear_cross_entropy(*x, shape.form)[0], inputs)
    direct = outputs_and_grads(lambda *x: linear_cross_entropy_direct(*x, shape.form)[0], inputs)
    assert_close(ours, direct, 1e-12)
    squares = [f(*inputs, shape.form)[1] for f in (linear_cross_entropy, linear_cross_entropy_direct)]
    assert_close(squares[:1], squares[1:], 1e-12)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, targets = inputs_of(SHAPES[1], 0.2, 1.0)
    loss, _ = linear_cross_entropy(x.requires_grad_(), weight, targets)
    (grad,) = torch.autograd.grad(loss, x)
    (direct,) = torch.autograd.grad(linear_cross_entropy_direct(x, weight, targets)[0], x)
    assert_close([grad], [direct], 1e-12)
    with torch.no_grad():
        assert_close([linear_cross_entropy(x, weight, targets)[0]], [loss.detach()], 1e-12)
