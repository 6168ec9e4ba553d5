import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.selective_scan import selective_scan
from kernels.selective_scan.reference import selective_scan_recurrent
from kernels.selective_scan.shapes import SHAPES, Shape
from tests.closeness import assert_close, assert_true, outputs_and_grads, with_grads

LIMIT = 1e-10
STEPS = ["random", "small", "large", "mixed"]


def inputs_of(shape: Shape, steps: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rows, tokens, channels, states = shape
    x = torch.randn(rows, tokens, channels, dtype=torch.float64)
    k, q = torch.randn(2, rows, tokens, states, dtype=torch.float64)
    rate = 16.0 * torch.rand(channels, states, dtype=torch.float64)
    step = 0.3 * torch.rand(rows, tokens, channels, dtype=torch.float64)
    if steps == "small":
        step = 1e-3 * step
    elif steps == "large":
        step = 1e3 * (1.0 + step)
    elif steps == "mixed":
        step[:, ::3] = 0.0
        step[:, 1::5] = 1e4
    state = torch.randn(rows, channels, states, dtype=torch.float64)
    return [part.to(dtype) for part in (x, step, rate, k, q, state)]


def compare(inputs: list[Tensor], document: Tensor | None) -> None:
    def call(scan):
        return lambda x, step, rate, k, q, s: scan(x, step, rate, k, q, document=document, initial_state=s)

    ours = outputs_and_grads(call(selective_scan), inputs)
    assert_true(ours, with_grads(call(selective_scan_recurrent)), inputs, LIMIT)


def documents_of(rows: int, tokens: int, starts: float) -> Tensor:
    return (torch.rand(rows, tokens) < starts).long().cumsum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("starts", [None, 0.1])
def test_equals_the_recurrence_in_float64(shape: Shape, steps: str, starts: float | None) -> None:
    inputs = inputs_of(shape, steps)
    document = None if starts is None else documents_of(shape.rows, shape.tokens, starts)
    compare(inputs, document)


@pytest.mark.parametrize("steps", STEPS)
def test_float32_is_close_to_float64(steps: str) -> None:
    shape = SHAPES[-1]
    inputs = inputs_of(shape, steps, torch.float32)
    compare(inputs, documents_of(shape.rows, shape.tokens, 0.05))


@given(
    tokens=st.integers(1, 80),
    starts=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    steps=st.sampled_from(STEPS),
    seed=st.integers(0, 2**20),
)
def test_equals_the_recurrence_for_any_length_and_documents(
    tokens: int, starts: float, steps: str, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = inputs_of(Shape(2, tokens, 3, 4), steps)
    compare(inputs, documents_of(2, tokens, starts))


def test_states_carry_over_between_calls() -> None:
    x, step, rate, k, q, state = inputs_of(Shape(2, 60, 4, 3), "random")
    whole, last = selective_scan(x, step, rate, k, q, initial_state=state)
    head, middle = selective_scan(x[:, :21], step[:, :21], rate, k[:, :21], q[:, :21], initial_state=state)
    tail, end = selective_scan(x[:, 21:], step[:, 21:], rate, k[:, 21:], q[:, 21:], initial_state=middle)
    assert_close([torch.cat([head, tail], 1), end], [whole, last], LIMIT)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("step", lambda x: (x[0], x[1][:, :-1], *x[2:])),
        ("rate", lambda x: (*x[:2], x[2][:3], *x[3:])),
        ("k", lambda x: (*x[:3], x[3][..., :1], x[4])),
        ("q", lambda x: (*x[:4], x[4].float())),
        ("x", lambda x: (x[0][:, :0], x[1][:, :0], x[2], x[3][:, :0], x[4][:, :0])),
    ],
)
def test_wrong_arguments_are_named(name: str, change) -> None:
    with pytest.raises(Exception, match=name):
        selective_scan(*change(tuple(inputs_of(Shape(1, 8, 4, 3), "random")[:5])))
