import math

import pytest
import torch

from kernels.activation import activate
from kernels.activation.shapes import SHAPES, Shape


def by_hand(gate: float, up: float, shape: Shape) -> float:
    def cut(x: float, low: float) -> float:
        return x if shape.limit is None else max(low, min(shape.limit, x))

    if shape.kind == "relu2":
        return max(0.0, up) ** 2
    if not shape.clamps_product:
        gate, up = cut(gate, -math.inf), cut(up, -(shape.limit or math.inf))
    if shape.kind == "shifted_swiglu":
        return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)
    if shape.kind == "geglu":
        act = 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        act = gate / (1 + math.exp(-gate))
    if shape.clamps_product:
        act, up = cut(act, -math.inf), cut(up, -(shape.limit or math.inf))
    return act * up


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_definition_number_by_number(shape: Shape) -> None:
    columns = shape.hidden if shape.kind == "relu2" else 2 * shape.hidden
    hidden = 2 * torch.randn(shape.rows, columns, dtype=torch.float64)
    out = activate(hidden, shape.kind, limit=shape.limit, clamps_product=shape.clamps_product)
    gates, ups = hidden[:, : shape.hidden], hidden[:, -shape.hidden :]
    pairs = zip(gates.flatten().tolist(), ups.flatten().tolist(), strict=True)
    expected = torch.tensor([by_hand(gate, up, shape) for gate, up in pairs], dtype=torch.float64)
    assert torch.allclose(out.flatten(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_small_differences(shape: Shape) -> None:
    columns = shape.hidden if shape.kind == "relu2" else 2 * shape.hidden
    hidden = torch.randn(shape.rows, columns, dtype=torch.float64, requires_grad=True)
    form = {"limit": shape.limit, "clamps_product": shape.clamps_product}
    assert torch.autograd.gradcheck(lambda x: activate(x, shape.kind, **form), hidden)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="hidden: expected an even number"):
        activate(torch.randn(2, 3), "swiglu")
    with pytest.raises(ValueError, match="limit: expected None"):
        activate(torch.randn(2, 4), "relu2", limit=1.0)
