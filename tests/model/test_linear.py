"""Products in float32 of inputs in bfloat16, whose backward keeps the input as it is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from model.linear import wide_linear
from model.residual import rms_linear

EPS = 1e-3


def normed_linear(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x / (x.square().mean(-1, keepdim=True) + EPS).sqrt(), weight)


@pytest.mark.parametrize(
    ("ours", "definition"),
    [(wide_linear, linear), (lambda x, weight: rms_linear(x, weight, EPS), normed_linear)],
    ids=["product", "product of the normed input"],
)
def test_a_wide_product_and_its_gradients(
    ours: Callable[[Tensor, Tensor], Tensor], definition: Callable[[Tensor, Tensor], Tensor]
) -> None:
    x = torch.randn(3, 5, 24).bfloat16()
    weight, pull = torch.randn(7, 24), torch.randn(3, 5, 7)
    found, true = [], []
    for function, results, dtype in ((ours, found, None), (definition, true, torch.float64)):
        leaves = [part.detach().to(dtype or part.dtype).requires_grad_() for part in (x, weight)]
        out = function(*leaves)
        results += [out, *torch.autograd.grad(out, leaves, pull.to(out.dtype))]
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.float32]
    for part, exact in zip(found, true, strict=True):
        # Of the input's gradient the last rounding is to bfloat16.
        limit = 2**-8 if part.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(part.double(), exact, rtol=limit, atol=1e-5)
