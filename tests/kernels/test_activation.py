import math

import pytest
import torch

from kernels.activation import CASES, Case, activate


def by_hand(gate: float, up: float, case: Case) -> float:
    def cut(x: float, low: float) -> float:
        return x if case.limit is None else max(low, min(case.limit, x))

    if case.kind == "relu2":
        return max(0.0, up) ** 2
    if not case.clamps_product:
        gate, up = cut(gate, -math.inf), cut(up, -(case.limit or math.inf))
    if case.kind == "shifted_swiglu":
        return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)
    if case.kind == "geglu":
        act = 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        act = gate / (1 + math.exp(-gate))
    if case.clamps_product:
        act, up = cut(act, -math.inf), cut(up, -(case.limit or math.inf))
    return act * up


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_its_definition_number_by_number(case: Case) -> None:
    columns = case.hidden if case.kind == "relu2" else 2 * case.hidden
    hidden = 2 * torch.randn(case.rows, columns, dtype=torch.float64)
    out = activate(hidden, case.kind, limit=case.limit, clamps_product=case.clamps_product)
    gates, ups = hidden[:, : case.hidden], hidden[:, -case.hidden :]
    pairs = zip(gates.flatten().tolist(), ups.flatten().tolist(), strict=True)
    expected = torch.tensor([by_hand(gate, up, case) for gate, up in pairs], dtype=torch.float64)
    assert torch.allclose(out.flatten(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_small_differences(case: Case) -> None:
    columns = case.hidden if case.kind == "relu2" else 2 * case.hidden
    hidden = torch.randn(case.rows, columns, dtype=torch.float64, requires_grad=True)
    form = {"limit": case.limit, "clamps_product": case.clamps_product}
    assert torch.autograd.gradcheck(lambda x: activate(x, case.kind, **form), hidden)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="hidden: expected an even number"):
        activate(torch.randn(2, 3), "swiglu")
    with pytest.raises(ValueError, match="limit: expected None"):
        activate(torch.randn(2, 4), "relu2", limit=1.0)
