"""Routed experts in Triton where routing is at its worst, and proof that these tests see a wrong kernel."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.choose import use_backends
from kernels.experts import PLAIN, ExpertBiases, ExpertForm, routed_experts, triton_products
from kernels.experts import triton as triton_form
from kernels.experts.reference import experts_direct
from kernels.experts.shapes import Shape
from kernels.experts.spec import SMALL
from kernels.experts.triton import routed_experts_triton
from kernels.experts.triton_sort import Sorted, sort_by_expert
from kernels.spec import KernelCase, outputs_and_grads, relative_errors
from tests.closeness import assert_kernel, relative

pytestmark = pytest.mark.interpreted

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
SHAPE = Shape(37, 24, 6, 2, 40)


def inputs_of(shape: Shape, dtype: torch.dtype, form: ExpertForm = PLAIN, has_bias: bool = False) -> dict:
    tokens, width, experts, top_k, hidden = shape
    columns = hidden if form.kind == "relu2" else 2 * hidden
    inputs = {
        "x": torch.randn(tokens, width),
        "gate_up": torch.randn(experts, columns, width) / width**0.5,
        "down": torch.randn(experts, width, hidden) / hidden**0.5,
        "weights": torch.rand(tokens, top_k),
    }
    if has_bias:
        inputs |= {"up_bias": torch.randn(experts, columns), "down_bias": torch.randn(experts, width)}
    return {name: x.to(dtype) for name, x in inputs.items()}


def case_of(inputs: dict, chosen: Tensor, form: ExpertForm = PLAIN) -> KernelCase:
    def run(function, more: dict, x, gate_up, down, weights, *biases):
        packed = ExpertBiases(*biases) if biases else None
        return (function(x, gate_up, down, chosen, weights, form, packed, **more),)

    return KernelCase(
        inputs,
        lambda **given: run(routed_experts_triton, {"tiles": SMALL}, *given.values()),
        lambda **given: run(experts_direct, {}, *given.values()),
    )


def routing_of(name: str, shape: Shape) -> Tensor:
    tokens, _, experts, top_k, _ = shape
    scores = torch.rand(tokens, experts)
    if name == "one expert":
        scores[:, 2] += 10
    elif name == "first and last idle":
        scores[:, [0, -1]] -= 10
    elif name == "first and last only":
        scores[:, [0, -1]] += 10
    elif name == "the same twice":
        return torch.randint(experts, (tokens, 1)).expand(tokens, top_k)
    elif name == "all idle":
        return torch.full((tokens, top_k), experts)
    elif name == "hashed":
        return (torch.arange(tokens)[:, None] * 7 + torch.arange(top_k) * 3) % experts
    return scores.topk(top_k, dim=-1).indices


ROUTINGS = (
    "one expert",
    "first and last idle",
    "first and last only",
    "the same twice",
    "all idle",
    "hashed",
)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_any_routing_is_exact(routing: str, dtype: torch.dtype) -> None:
    chosen = routing_of(routing, SHAPE)
    assert_kernel(case_of(inputs_of(SHAPE, dtype, has_bias=True), chosen), LIMITS[dtype])


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_tiles_may_be_full_or_miss_a_row(tokens: int) -> None:
    shape = SHAPE._replace(tokens=tokens, top_k=1)
    assert_kernel(case_of(inputs_of(shape, torch.float32), torch.full((tokens, 1), 3)))


@settings(max_examples=10)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 40),
    experts=st.integers(1, 9),
    hidden=st.integers(1, 40),
    top_k=st.integers(1, 4),
    num_idle=st.integers(0, 3),
    kind=st.sampled_from(["swiglu", "geglu", "shifted_swiglu", "relu2"]),
    limit=st.sampled_from([None, 0.2, 3.0]),
    clamps_product=st.booleans(),
    scales_input=st.booleans(),
    has_bias=st.booleans(),
    dtype=st.sampled_from(list(LIMITS)),
    seed=st.integers(0, 2**20),
)
def test_every_form_and_shape(
    tokens, width, experts, hidden, top_k, num_idle, kind, limit, clamps_product, scales_input, has_bias,
    dtype, seed,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    if dtype == torch.bfloat16:
        # The rounding of a few numbers says nothing.
        tokens, width, hidden = (max(8, size) for size in (tokens, width, hidden))
    shape = Shape(tokens, width, experts, top_k, hidden)
    form = ExpertForm(kind, limit, clamps_product, scales_input)
    chosen = torch.randint(experts + num_idle, (tokens, top_k))
    assert_kernel(case_of(inputs_of(shape, dtype, form, has_bias), chosen, form), LIMITS[dtype])


def test_a_weight_of_zero_has_a_gradient() -> None:
    inputs = inputs_of(SHAPE, torch.float32, has_bias=True)
    inputs["weights"][::2] = 0.0
    for form in (PLAIN, ExpertForm(scales_input=True)):
        assert_kernel(case_of(inputs, routing_of("random", SHAPE), form))


def test_large_numbers_stay_finite() -> None:
    inputs = inputs_of(SHAPE, torch.float32)
    inputs["x"] *= 1000
    for kind in ("swiglu", "geglu", "shifted_swiglu"):
        form = ExpertForm(kind)
        assert_kernel(case_of(inputs, routing_of("random", SHAPE), form))


def test_strided_inputs_are_read_as_they_lie() -> None:
    chosen = routing_of("random", SHAPE)
    inputs = inputs_of(SHAPE, torch.float32)
    plain = outputs_and_grads(case_of(inputs, chosen).triton, inputs)
    strided = {name: torch.stack([x, x * 0], dim=-1)[..., 0].mT.contiguous().mT for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    wide = torch.stack([chosen, chosen * 0], dim=-1)[..., 0]
    out = routed_experts_triton(**strided, chosen=wide, tiles=SMALL)
    assert torch.equal(out, plain["out0"])


def test_twice_is_bitwise_the_same() -> None:
    inputs = inputs_of(SHAPE, torch.bfloat16, has_bias=True)
    case = case_of(inputs, routing_of("random", SHAPE), ExpertForm("shifted_swiglu", 0.7))
    first, second = (outputs_and_grads(case.triton, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_token_reaches_its_own_output_and_experts_alone() -> None:
    chosen = routing_of("random", SHAPE)
    chosen[5] = torch.tensor([4, 5])
    inputs = inputs_of(SHAPE, torch.float32)
    before = routed_experts_triton(**inputs, chosen=chosen, tiles=SMALL)
    inputs["x"][5] *= 100
    after = routed_experts_triton(**inputs, chosen=chosen, tiles=SMALL)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[6:], after[6:])
    idle = routing_of("one expert", SHAPE._replace(top_k=1))
    grads = outputs_and_grads(case_of(inputs, idle.expand(-1, 2)).triton, inputs)
    for name in ("grad gate_up", "grad down"):
        rest = torch.cat([grads[name][:2], grads[name][3:]])
        assert torch.equal(rest, torch.zeros_like(rest))


@pytest.mark.parametrize("choices", [0, 1, 64, 301])
@pytest.mark.parametrize("experts", [1, 5, 40])
def test_rows_are_sorted_as_a_stable_sort_does(choices: int, experts: int) -> None:
    chosen = torch.randint(experts + 2, (choices,))
    found = sort_by_expert(chosen, experts, 16, block=32)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=experts)[:experts]
    real = int(counts.sum())
    assert torch.equal(found.ends, counts.cumsum(0).int())
    assert torch.equal(found.order[:real], order[:real].int())
    assert torch.equal(found.row_of[order[:real]], torch.arange(real).int())
    assert (found.row_of[order[real:]] == choices).all()
    tiles = [(e, int(end - n) + t) for e, (n, end) in enumerate(zip(counts, counts.cumsum(0), strict=True))
             for t in range(0, int(n), 16)]  # fmt: skip
    assert int(found.tiles) == len(tiles) <= found.tile_expert.shape[0]
    listed = zip(found.tile_expert.tolist(), found.tile_first.tolist(), strict=True)
    assert list(listed)[: len(tiles)] == tiles


def test_the_config_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, chosen = inputs_of(SHAPE, torch.float32), routing_of("random", SHAPE)
    plain = routed_experts(**inputs, chosen=chosen)
    monkeypatch.setattr(triton_form, "tiles_for", lambda *_: SMALL)
    with use_backends({"experts": "triton"}):
        ours = routed_experts(**inputs, chosen=chosen)
    assert not torch.equal(ours, plain)
    exact = {name: x.double() for name, x in inputs.items()}
    assert relative(ours, routed_experts(**exact, chosen=chosen)) <= LIMITS[torch.float32]


def test_no_tokens_give_no_rows_and_zero_gradients() -> None:
    inputs = inputs_of(SHAPE._replace(tokens=0), torch.float32)
    found = outputs_and_grads(case_of(inputs, torch.zeros(0, 2, dtype=torch.long)).triton, inputs)
    assert found["out0"].shape == (0, SHAPE.width)
    assert torch.equal(found["grad gate_up"], torch.zeros_like(inputs["gate_up"]))


@triton.jit
def ups_before_gates(start, COLUMNS: tl.constexpr, IS_GATED: tl.constexpr, hidden):
    column = tl.arange(0, COLUMNS)
    return (1 - column % 2) * hidden + tl.minimum(start + column // 2, hidden - 1)


@triton.jit
def round_anywhere(x, limit, below, above):
    return x


def test_sabotage_swapped_columns_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(inputs_of(SHAPE, torch.float32), routing_of("random", SHAPE))
    monkeypatch.setattr(triton_products, "experts_columns", ups_before_gates)
    assert max(relative_errors(case).values()) > 1e-2


def test_sabotage_a_lost_tile_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_one(*args, **more) -> Sorted:
        found = sort_by_expert(*args, **more)
        return found._replace(tiles=found.tiles - 1)

    case = case_of(inputs_of(SHAPE, torch.float32), routing_of("one expert", SHAPE))
    monkeypatch.setattr(triton_form, "sort_by_expert", lose_one)
    assert not max(relative_errors(case).values()) <= 1e-2


def test_sabotage_rounding_across_the_limit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, form = Shape(64, 32, 4, 2, 48), ExpertForm("swiglu", limit=0.5)
    case = case_of(inputs_of(shape, torch.bfloat16, form), routing_of("random", shape), form)
    assert_kernel(case, LIMITS[torch.bfloat16])
    monkeypatch.setattr(triton_products, "round_on_side", round_anywhere)
    assert max(relative_errors(case).values()) > LIMITS[torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("chosen", {"chosen": torch.zeros(4, 2)}),
        ("chosen", {"chosen": torch.zeros(4, 0, dtype=torch.long), "weights": torch.zeros(4, 0)}),
        ("weights", {"weights": torch.zeros(4, 3)}),
        ("down", {"down": torch.zeros(3, 8, 4, dtype=torch.float64)}),
        ("biases", {"biases": ExpertBiases(torch.zeros(3, 8).double(), torch.zeros(3, 8))}),
        ("gate_up", {"gate_up": torch.zeros(3, 8, 8, device="meta")}),
        ("form.limit", {"form": ExpertForm(limit=0.0)}),
    ],
)
def test_wrong_arguments_are_named(name: str, change: dict) -> None:
    arguments = {
        "x": torch.zeros(4, 8),
        "gate_up": torch.zeros(3, 8, 8),
        "down": torch.zeros(3, 8, 4),
        "chosen": torch.zeros(4, 2, dtype=torch.long),
        "weights": torch.zeros(4, 2),
    }
    with pytest.raises(Exception, match=name):
        routed_experts(**{**arguments, **change})
