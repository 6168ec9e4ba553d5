from functools import partial

import pytest
import torch

from kernels.experts import PLAIN, ExpertBiases, ExpertForm, routed_experts
from kernels.experts.reference import experts_direct
from kernels.experts.shapes import SHAPES, Shape
from tests.closeness import assert_close, assert_true, outputs_and_grads, with_grads


def inputs_of(shape: Shape, routing: str, dtype: torch.dtype) -> list[torch.Tensor]:
    tokens, width, experts, top_k, hidden = shape
    scores = torch.rand(tokens, experts)
    if routing == "one expert":
        scores[:, 0] += 10
    elif routing == "first and last idle" and experts - 2 >= top_k:
        scores[:, [0, -1]] -= 10
    chosen = scores.topk(top_k, dim=-1).indices
    weights = torch.rand(tokens, top_k, dtype=dtype)
    x = torch.randn(tokens, width, dtype=dtype)
    gate_up = torch.randn(experts, 2 * hidden, width, dtype=dtype) / width**0.5
    down = torch.randn(experts, width, hidden, dtype=dtype) / hidden**0.5
    return [x, gate_up, down, chosen, weights]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("routing", ["random", "one expert", "first and last idle"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grouped_equals_one_token_at_a_time(shape: Shape, routing: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(shape, routing, dtype)
    ours = outputs_and_grads(routed_experts, inputs)
    assert_true(ours, with_grads(experts_direct), inputs, 1e-12)


FORMS = (
    ExpertForm("swiglu", limit=0.3),
    ExpertForm("swiglu", limit=0.3, clamps_product=True),
    ExpertForm("shifted_swiglu", limit=0.7),
    ExpertForm("geglu"),
    ExpertForm("relu2"),
    ExpertForm("swiglu", scales_input=True),
)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_idle", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_form_equals_one_token_at_a_time(
    form: ExpertForm, has_bias: bool, num_idle: int, dtype: torch.dtype
) -> None:
    tokens, width, experts, top_k, hidden = 33, 16, 8, 3, 16
    columns = hidden if form.kind == "relu2" else 2 * hidden
    chosen = torch.rand(tokens, experts + num_idle).topk(top_k, dim=-1).indices
    inputs = [
        torch.randn(tokens, width, dtype=dtype),
        torch.randn(experts, columns, width, dtype=dtype) / width**0.5,
        torch.randn(experts, width, hidden, dtype=dtype) / hidden**0.5,
        torch.rand(tokens, top_k, dtype=dtype),
    ]
    if has_bias:
        inputs += [torch.randn(experts, columns, dtype=dtype), torch.randn(experts, width, dtype=dtype)]

    def run(function, x, gate_up, down, weights, *biases, **more):
        packed = ExpertBiases(*biases) if biases else None
        return function(x, gate_up, down, chosen, weights, form, packed, **more)

    ours = outputs_and_grads(lambda *args: run(routed_experts, *args, num_idle=num_idle), inputs)
    direct = with_grads(partial(run, experts_direct))
    assert_true(ours, direct, inputs, 1e-12)


def test_the_plain_form_does_not_depend_on_the_way_it_is_computed() -> None:
    inputs = inputs_of(Shape(33, 16, 8, 3, 16), "random", torch.float64)
    idle = outputs_and_grads(lambda *args: routed_experts(*args, PLAIN, num_idle=2), inputs)
    assert_close(outputs_and_grads(routed_experts, inputs), idle, 1e-12)


def test_an_idle_expert_gets_a_zero_gradient() -> None:
    inputs = inputs_of(Shape(16, 16, 4, 1, 16), "one expert", torch.float32)
    _, _, gate_up, down, _ = outputs_and_grads(routed_experts, inputs)
    assert torch.equal(gate_up[1:], torch.zeros_like(gate_up[1:]))
    assert torch.equal(down[1:], torch.zeros_like(down[1:]))
    assert gate_up[0].abs().sum() > 0
