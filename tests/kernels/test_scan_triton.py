"""The delta rule and linear attention in Triton, where they are hardest: gates, keys, documents, defects."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from kernels.delta_rule import gated_delta_rule, triton_solve
from kernels.delta_rule import triton_channel as delta_channel
from kernels.delta_rule import triton_head as delta_head
from kernels.delta_rule.reference import gated_delta_rule_recurrent
from kernels.delta_rule.triton import gated_delta_rule_triton
from kernels.linear_attention import triton_channel, triton_head
from kernels.linear_attention.reference import linear_attention_recurrent
from kernels.linear_attention.spec import small_tiles
from kernels.linear_attention.triton import linear_attention_triton
from kernels.spec import KernelCase, outputs_and_grads, relative_errors
from tests.closeness import assert_case, assert_kernel, relative

pytestmark = pytest.mark.interpreted
LIMIT = 1e-5
TOKENS, HEADS, KEY_DIM, VALUE_DIM = 37, 2, 8, 8
TILES = small_tiles(TOKENS)
SPANS = ["head", "channel"]


def inputs_of(span: str, tokens: int = TOKENS, groups: int = 1) -> dict[str, Tensor]:
    shape = (1, tokens, HEADS, KEY_DIM)[: 3 + (span == "channel")]
    return {
        "q": torch.randn(1, tokens, HEADS // groups, KEY_DIM) * KEY_DIM**-0.5,
        "k": normalize(torch.randn(1, tokens, HEADS // groups, KEY_DIM), dim=-1),
        "v": torch.randn(1, tokens, HEADS, VALUE_DIM),
        "log_decay": -torch.rand(shape),
        "beta": torch.rand(1, tokens, HEADS),
        "initial_state": torch.randn(1, HEADS, KEY_DIM, VALUE_DIM),
    }


def delta_case(inputs: dict[str, Tensor], document: Tensor | None = None) -> KernelCase:
    return KernelCase(
        inputs,
        lambda **x: gated_delta_rule_triton(**x, document=document, tiles=TILES),
        lambda **x: gated_delta_rule_recurrent(**x, document=document),
    )


def linear_case(inputs: dict[str, Tensor], document: Tensor | None = None) -> KernelCase:
    kept = {name: x for name, x in inputs.items() if name != "beta"}
    return KernelCase(
        kept,
        lambda **x: linear_attention_triton(**x, document=document, tiles=TILES),
        lambda **x: linear_attention_recurrent(**x, document=document),
    )


def finite_gates(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name != "grad log_decay"}


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("gate", ["none", "strong", "forgets", "mixed"])
def test_gates_of_any_strength(span: str, gate: str) -> None:
    inputs = inputs_of(span)
    decay = inputs["log_decay"]
    if gate == "none":
        decay.zero_()
    elif gate == "strong":
        decay.mul_(20.0)
    elif gate == "forgets":
        decay[:, ::3] = -1e4
    else:
        decay[..., ::2] = 0.0
        decay[..., 1::2] = -50.0
    for case in (delta_case(inputs), linear_case(inputs)):
        found = relative_errors(case)
        # Of a gate beyond exp's reach the gradient is zero for both, to different bits of nothing.
        assert max((finite_gates(found) if gate in ("forgets", "mixed") else found).values()) <= LIMIT, found


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("keys", ["positive", "equal", "four", "zero"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_keys_that_are_alike(span: str, keys: str, beta: float) -> None:
    inputs = inputs_of(span)
    inputs["beta"].fill_(beta)
    k = inputs["k"]
    if keys == "positive":
        inputs["k"] = normalize(k.abs(), dim=-1)
    elif keys == "equal":
        inputs["k"] = k[:, :1].expand_as(k).clone()
    elif keys == "four":
        inputs["k"] = k[:, torch.arange(TOKENS) % 4]
    else:
        inputs["k"] = torch.zeros_like(k)
    inputs["log_decay"] *= 0.05
    assert_case(delta_case(inputs))


@settings(max_examples=8)
@given(
    tokens=st.sampled_from([1, 15, 16, 17, 31, 40]),
    groups=st.sampled_from([1, 2]),
    starts=st.sampled_from([0.05, 0.3, 1.0]),
    span=st.sampled_from(SPANS),
    seed=st.integers(0, 2**20),
)
def test_documents_of_any_length(tokens: int, groups: int, starts: float, span: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = inputs_of(span, tokens, groups)
    document = (torch.rand(1, tokens) < starts).long().cumsum(1)
    for case in (delta_case(inputs, document), linear_case(inputs, document)):
        assert_kernel(case, LIMIT)


@pytest.mark.parametrize("span", SPANS)
def test_a_document_is_the_same_packed_and_alone(span: str) -> None:
    inputs = inputs_of(span)
    inputs.pop("initial_state")
    document = (torch.arange(TOKENS) >= 21).long()[None]
    packed, _ = gated_delta_rule_triton(**inputs, document=document, tiles=TILES)
    before = {name: x.clone() for name, x in inputs.items()}
    for x in before.values():
        x[:, 21:] += 0.25
    changed, _ = gated_delta_rule_triton(**before, document=document, tiles=TILES)
    assert torch.equal(packed[:, :21], changed[:, :21])
    alone = {name: x[:, 21:] for name, x in inputs.items()}
    exact, _ = gated_delta_rule_recurrent(**{name: x.double() for name, x in alone.items()})
    # Tiles begin at another token: the same float32 sums in another order.
    for found in (packed[:, 21:], gated_delta_rule_triton(**alone, tiles=TILES)[0]):
        assert relative(found, exact) <= LIMIT


@pytest.mark.parametrize("span", SPANS)
def test_a_state_carries_a_row_on(span: str) -> None:
    inputs = inputs_of(span)
    whole, end = gated_delta_rule_recurrent(**{name: x.double() for name, x in inputs.items()})
    first, state = gated_delta_rule_triton(
        **{name: x if name == "initial_state" else x[:, :19] for name, x in inputs.items()}, tiles=TILES
    )
    rest = {name: x[:, 19:] for name, x in inputs.items() if name != "initial_state"}
    second, last = gated_delta_rule_triton(**rest, initial_state=state, tiles=TILES)
    # Other tiles, and a state that passed through memory: float32 sums in another order.
    assert relative(torch.cat([first, second], dim=1), whole) <= LIMIT
    assert relative(last, end) <= LIMIT


@pytest.mark.parametrize("span", SPANS)
def test_strided_inputs_and_bitwise_repeats(span: str) -> None:
    inputs = inputs_of(span)
    wide = torch.cat([inputs["q"], inputs["k"], inputs["v"]], dim=-1)
    parts = dict(zip("qkv", wide.split([KEY_DIM, KEY_DIM, VALUE_DIM], dim=-1), strict=True))
    first = outputs_and_grads(delta_case(inputs).triton, inputs)
    second = outputs_and_grads(delta_case(inputs).triton, {**inputs, **parts})
    assert all(torch.equal(first[name], second[name]) for name in first)


def running_without_decay(log_decay, start, head, count, CHUNK: tl.constexpr, HAS_DECAY: tl.constexpr):
    return (tl.arange(0, CHUNK) * 0).to(tl.float64)


def documents_that_never_end(
    document, start, count, is_first, CHUNK: tl.constexpr, HAS_DOCUMENT: tl.constexpr
):
    t = tl.arange(0, CHUNK)
    return t * 0, t >= 0, t >= 0


@pytest.mark.parametrize(
    ("modules", "name", "defect", "span"),
    [
        ((triton_head, delta_head), "running_decay", running_without_decay, "head"),
        ((triton_head, delta_head), "chunk_documents", documents_that_never_end, "head"),
        ((triton_channel, delta_channel), "chunk_documents", documents_that_never_end, "channel"),
    ],
)
def test_a_defect_in_a_kernel_is_seen(modules, name, defect, span, monkeypatch) -> None:
    document = (torch.arange(TOKENS) >= 21).long()[None]
    cases = [form(inputs_of(span), document) for form in (delta_case, linear_case)]
    assert max(max(relative_errors(case).values()) for case in cases) <= LIMIT
    for module in modules:
        monkeypatch.setattr(module, name, triton.jit(defect))
    assert all(not max(relative_errors(case).values()) <= 1e-3 for case in cases)


def test_a_lost_merge_of_the_inverse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(inverse, below, first, CHUNK: tl.constexpr, SIZE: tl.constexpr):
        return inverse

    inputs = inputs_of("head", 64)
    tiles = small_tiles(64)
    case = KernelCase(
        inputs,
        lambda **x: gated_delta_rule_triton(**x, tiles=tiles),
        lambda **x: gated_delta_rule_recurrent(**x),
    )
    assert_kernel(case, LIMIT)
    monkeypatch.setattr(triton_solve, "_with_corner", triton.jit(merged))
    assert not max(relative_errors(case).values()) <= 1e-3


def test_wrong_arguments_are_named() -> None:
    inputs = inputs_of("head")
    for name, change in (
        ("k", inputs["k"].double()),
        ("beta", inputs["beta"][:, 1:]),
        ("v", inputs["v"][:, 1:]),
    ):
        with pytest.raises(Exception, match=name):
            gated_delta_rule(**{**inputs, name: change})
