import math

import pytest
import torch

from kernels.sinkhorn import sinkhorn
from kernels.sinkhorn.reference import sinkhorn_iterated
from kernels.sinkhorn.shapes import SHAPES, Shape
from tests.closeness import assert_close, assert_rounded, outputs_and_grads, with_grads


def by_hand(logits: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    n = len(logits)
    matrix = []
    for row in logits:
        total = sum(map(math.exp, row))
        matrix.append([math.exp(x) / total + eps for x in row])
    for turn in range(iterations):
        if turn:
            matrix = [[x / (sum(row) + eps) for x in row] for row in matrix]
        sums = [sum(matrix[i][j] for i in range(n)) + eps for j in range(n)]
        matrix = [[matrix[i][j] / sums[j] for j in range(n)] for i in range(n)]
    return matrix


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_definition_number_by_number(shape: Shape) -> None:
    logits = torch.randn(shape.matrices, shape.streams, shape.streams, dtype=torch.float64)
    out = sinkhorn(logits, iterations=shape.iterations, eps=1e-6)
    expected = [by_hand(matrix, shape.iterations, 1e-6) for matrix in logits.tolist()]
    assert torch.allclose(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-10)


def test_many_iterations_are_doubly_stochastic() -> None:
    out = sinkhorn(torch.randn(50, 4, 4, dtype=torch.float64), iterations=200, eps=1e-9)
    assert torch.allclose(out.sum(-1), torch.ones(50, 4, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(out.sum(-2), torch.ones(50, 4, dtype=torch.float64), atol=1e-6)


def test_gradients_are_those_of_small_differences() -> None:
    logits = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, iterations=20, eps=1e-6), logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_iteration_as_written(shape: Shape, dtype: torch.dtype) -> None:
    inputs = [3 * torch.randn(2, shape.matrices, shape.streams, shape.streams, dtype=dtype)]
    options = {"iterations": shape.iterations, "eps": 1e-6}
    found = outputs_and_grads(lambda x: sinkhorn(x, **options), inputs)
    written = with_grads(lambda x: sinkhorn_iterated(x, **options))
    if dtype == torch.float64:
        # One stream has nothing to mix: its gradient is rounding around zero.
        assert_close(found, written(*inputs), 1e-12, cancels=1.0)
    else:
        assert_rounded(found, written, inputs)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="iterations: expected at least 1"):
        sinkhorn(torch.randn(3, 3), iterations=0, eps=1e-6)
