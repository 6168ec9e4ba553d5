"""The affine map of a chunk against the recurrence: states, outputs, gradients of the first state."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.choose import use_backends
from kernels.delta_rule.reference import gated_delta_rule_recurrent
from kernels.delta_rule.summary import delta_rule_initial_state_grad, delta_rule_summary
from kernels.linear_attention.reference import linear_attention_recurrent
from kernels.linear_attention.summary import linear_attention_initial_state_grad, linear_attention_summary
from kernels.selective_scan.reference import selective_scan_recurrent
from kernels.selective_scan.summary import selective_scan_initial_state_grad, selective_scan_summary
from tests.closeness import relative

ROWS, GROUPS, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 4, 16, 3
LIMIT = 1e-12  # float64, sums in another order
DOCUMENTS = ("none", "one", "many", "last token")
DECAYS = ("head", "channel", "with zeros")
Recurrence = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def documents_of(kind: str, tokens: int) -> Tensor | None:
    if kind == "none":
        return None
    index = torch.arange(tokens)
    starts = {"one": [0], "many": [0, tokens // 3, tokens // 2 + 1], "last token": [0, tokens - 1]}[kind]
    # The second row goes on to its end: rows differ.
    row = (index[:, None] >= torch.tensor(starts)).sum(1)
    return torch.stack([row, torch.full_like(row, 3)])


def drawn(decay: str, tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    log_decay = -0.1 * torch.rand(ROWS, tokens, HEADS, KEY_DIM, dtype=torch.float64)
    if decay == "with zeros":
        # The second row forgets all in the middle.
        log_decay[1, tokens // 2] = float("-inf")
    inputs = {
        "q": torch.randn(ROWS, tokens, GROUPS, KEY_DIM, dtype=torch.float64),
        "k": normalize(torch.randn(ROWS, tokens, GROUPS, KEY_DIM, dtype=torch.float64), dim=-1),
        "v": torch.randn(ROWS, tokens, HEADS, VALUE_DIM, dtype=torch.float64),
        "log_decay": log_decay if decay == "channel" else log_decay[..., 0],
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def truth(run: Recurrence, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the state adds to outputs and to the last state, the last state without it, weights, gradient.

    `run` takes the first state and a factor of the values: differences would lose digits.
    """
    state = state.clone().requires_grad_()
    read, carried = run(state, 0.0)
    _, added = run(torch.zeros_like(state), 1.0)
    weight = torch.randn_like(read)
    (gradient,) = torch.autograd.grad((read * weight).sum(), state)
    return read.detach(), carried.detach(), added, weight, gradient


@pytest.mark.parametrize("tokens", [1, 3, 32, 75])
@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule(decay: str, kind: str, tokens: int) -> None:
    inputs, document = drawn(decay, tokens), documents_of(kind, tokens)
    inputs["beta"] = 2 * torch.rand(ROWS, tokens, HEADS, dtype=torch.float64)
    state = torch.randn(ROWS, HEADS, KEY_DIM, VALUE_DIM, dtype=torch.float64)

    def run(first: Tensor, values: float) -> tuple[Tensor, Tensor]:
        scaled = {**inputs, "v": values * inputs["v"]}
        return gated_delta_rule_recurrent(**scaled, document=document, initial_state=first)

    read, carried, added, weight, gradient = truth(run, state)
    summary = delta_rule_summary(**inputs, document=document)
    assert relative(summary.added, added) < LIMIT
    assert relative(summary.transition @ state, carried) < LIMIT
    assert relative(torch.einsum("bthk,bhkv->bthv", summary.reads, state), read) < LIMIT
    assert relative(delta_rule_initial_state_grad(weight, summary.reads), gradient) < LIMIT


@pytest.mark.parametrize("tokens", [1, 3, 75])
@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("decay", [*DECAYS, "none"])
def test_linear_attention(decay: str, kind: str, tokens: int) -> None:
    inputs, document = drawn(decay, tokens), documents_of(kind, tokens)
    log_decay = inputs.pop("log_decay") if decay != "none" else None
    state = torch.randn(ROWS, HEADS, KEY_DIM, VALUE_DIM, dtype=torch.float64)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))

    def run(first: Tensor, values: float) -> tuple[Tensor, Tensor]:
        return linear_attention_recurrent(q, k, values * v, log_decay, document=document, initial_state=first)

    _, carried, added, weight, gradient = truth(run, state)
    factor, found = linear_attention_summary(k, v, log_decay, document=document)
    factor = factor[..., None] if factor.ndim == 3 else factor[..., None, None]
    assert relative(found, added) < LIMIT
    assert relative(factor * state, carried) < LIMIT
    asked = linear_attention_initial_state_grad(weight, q, log_decay, document=document)
    assert relative(asked, gradient) < LIMIT


@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_selective_scan(kind: str, tokens: int) -> None:
    document, (channels, states) = documents_of(kind, tokens), (4, 3)
    x, step = torch.randn(2, ROWS, tokens, channels, dtype=torch.float64)
    k, q = torch.randn(2, ROWS, tokens, states, dtype=torch.float64)
    step, rate = 0.1 * step.abs(), torch.rand(channels, states, dtype=torch.float64)
    state = torch.randn(ROWS, channels, states, dtype=torch.float64)

    def run(first: Tensor, values: float) -> tuple[Tensor, Tensor]:
        return selective_scan_recurrent(values * x, step, rate, k, q, document=document, initial_state=first)

    _, carried, added, weight, gradient = truth(run, state)
    steps, found = selective_scan_summary(x, step, rate, k, document=document)
    assert relative(found, added) < LIMIT
    passes = torch.ones(ROWS) if document is None else (document[:, 0] == document[:, -1]).double()
    factor = (-steps[..., None] * rate).exp() * passes[:, None, None]
    assert relative(factor * state, carried) < LIMIT
    asked = selective_scan_initial_state_grad(weight, step, rate, q, document=document)
    assert relative(asked, gradient) < LIMIT


@pytest.mark.interpreted
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_delta_rule_in_triton(decay: str) -> None:
    tokens = 70
    document = documents_of("many", tokens)
    inputs = drawn(decay, tokens, torch.float32)
    inputs["beta"] = torch.rand(ROWS, tokens, HEADS)
    with use_backends({"delta_rule": "triton"}):
        found = delta_rule_summary(**inputs, document=document)
    exact = {name: x.double() for name, x in inputs.items()}
    for ours, reference in zip(found, delta_rule_summary(**exact, document=document), strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, reference) < 1e-5
    # Where a document starts nothing is left, not a little.
    assert found.transition[0].abs().max() == 0.0
    assert found.transition[1].abs().max() > 0.0
