from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from kernels.delta_rule import gated_delta_rule
from kernels.delta_rule.channel import channel_delta_rule_chunked
from kernels.delta_rule.reference import gated_delta_rule_chunked, gated_delta_rule_recurrent
from kernels.linear_attention.shapes import SHAPES, Shape
from tests.closeness import assert_close, assert_rounded, assert_true, outputs_and_grads, with_grads

# The largest entry may differ by this much: 1e-10 is what float64 leaves after hundreds of products.
LIMIT = 1e-10


def inputs_of(shape: Shape, keys: str, decay: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rows, tokens, key_heads, heads, key_dim, value_dim = shape
    size = (rows, tokens, key_heads, key_dim)
    q = normalize(torch.randn(size, dtype=torch.float64), dim=-1)
    k = torch.randn(size, dtype=torch.float64)
    if keys == "positive":
        k = torch.rand(size, dtype=torch.float64)
    elif keys == "identical":
        k = torch.ones(size, dtype=torch.float64)
    elif keys == "duplicated":
        k = torch.randn(4, *size[2:], dtype=torch.float64)[torch.randint(4, size[:2])]
    elif keys == "zero":
        k = torch.zeros(size, dtype=torch.float64)
    v = torch.randn(rows, tokens, heads, value_dim, dtype=torch.float64)
    log_decay = -torch.rand(rows, tokens, heads, dtype=torch.float64)
    if decay == "one":
        log_decay = torch.zeros_like(log_decay)
    elif decay == "zero":
        log_decay = torch.full_like(log_decay, -1e4)
    elif decay == "mixed":
        log_decay[:, ::3] = 0.0
        log_decay[:, 1::7] = float("-inf")
    beta = torch.rand(rows, tokens, heads, dtype=torch.float64)
    state = torch.randn(rows, heads, key_dim, value_dim, dtype=torch.float64)
    return [x.to(dtype) for x in (q, normalize(k, dim=-1, eps=1e-6), v, log_decay, beta, state)]


def documents_of(rows: int, tokens: int, starts: float) -> Tensor:
    return (torch.rand(rows, tokens) < starts).long().cumsum(1)


def compare(inputs: list[Tensor], document: Tensor | None, limit: float) -> None:
    def call(rule):
        return lambda q, k, v, g, b, s: rule(q, k, v, g, b, document=document, initial_state=s)

    chunked = outputs_and_grads(call(gated_delta_rule_chunked), inputs)
    recurrent = outputs_and_grads(call(gated_delta_rule_recurrent), inputs)
    # -inf has no finite neighbour: the gate's own gradient there is of no use and is not compared.
    is_finite = torch.isfinite(inputs[3])
    for grads in (chunked, recurrent):
        grads[5] = grads[5].where(is_finite, 0.0)
    for ours, reference in zip(chunked, recurrent, strict=True):
        assert torch.isfinite(ours).all()
        scale = max(1.0, reference.abs().max().item())
        assert (ours - reference).abs().max().item() <= limit * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keys", ["random", "positive", "duplicated", "identical", "zero"])
@pytest.mark.parametrize("decay", ["random", "one", "zero", "mixed"])
def test_chunked_equals_recurrent_in_float64(shape: Shape, keys: str, decay: str) -> None:
    document = documents_of(shape.rows, shape.tokens, 0.05)
    compare(inputs_of(shape, keys, decay), document, LIMIT)


@given(
    tokens=st.integers(1, 150),
    key_heads=st.integers(1, 3),
    repeat=st.integers(1, 3),
    starts=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    keys=st.sampled_from(["random", "positive", "identical"]),
    seed=st.integers(0, 2**20),
)
def test_chunked_equals_recurrent_for_any_shape_and_documents(
    tokens: int, key_heads: int, repeat: int, starts: float, keys: str, seed: int
) -> None:
    torch.manual_seed(seed)
    shape = Shape(2, tokens, key_heads, key_heads * repeat, 5, 3)
    compare(inputs_of(shape, keys, "mixed"), documents_of(2, tokens, starts), LIMIT)


def test_float32_stays_exact_after_a_strong_decay() -> None:
    # A float32 running sum of log decays loses the small gates that follow a large one.
    shape = Shape(1, 128, 1, 1, 8, 8)
    inputs = inputs_of(shape, "random", "random", torch.float32)
    inputs[3] = torch.full_like(inputs[3], -1e-3)
    inputs[3][:, 5] = -900.0
    single = outputs_and_grads(lambda *x: gated_delta_rule(*x[:5], initial_state=x[5]), inputs)
    recurrent = lambda *x: gated_delta_rule_recurrent(*x[:5], initial_state=x[5])  # noqa: E731
    assert_rounded(single, with_grads(recurrent), inputs)


def test_states_carry_over_between_calls() -> None:
    inputs = inputs_of(Shape(2, 100, 2, 4, 6, 5), "random", "random")
    whole, last = gated_delta_rule(*inputs[:5], initial_state=inputs[5])
    head, middle = gated_delta_rule(*(x[:, :37] for x in inputs[:5]), initial_state=inputs[5])
    tail, end = gated_delta_rule(*(x[:, 37:] for x in inputs[:5]), initial_state=middle)
    assert_close([torch.cat([head, tail], 1), end], [whole, last], LIMIT)


def by_channel(shape: Shape, keys: str, decay: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Inputs with a decay per key channel; `mixed` has kept and forgotten channels beside each other."""
    inputs = inputs_of(shape, keys, decay, torch.float64)
    size = (*inputs[3].shape, shape.key_dim)
    inputs[3] = inputs[3][..., None] * torch.rand(size, dtype=torch.float64).clamp(min=1e-6)
    if decay == "bounded":
        inputs[3] = -5.0 * torch.rand(size, dtype=torch.float64)
    elif decay == "mixed":
        inputs[3][..., ::2] = 0.0
        inputs[3][..., 1::3] = -50.0
    return [x.to(dtype) for x in inputs]


def compare_by_channel(inputs: list[Tensor], document: Tensor | None) -> None:
    def results(rule, *inputs: Tensor) -> list[Tensor]:
        found = outputs_and_grads(
            lambda q, k, v, g, b, s: rule(q, k, v, g, b, document=document, initial_state=s), inputs
        )
        found[5] = found[5].where(torch.isfinite(inputs[3]), 0.0)
        return found

    ours = results(gated_delta_rule, *inputs)
    assert_true(ours, partial(results, gated_delta_rule_recurrent), inputs, LIMIT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keys", ["random", "positive", "duplicated", "identical", "zero"])
@pytest.mark.parametrize("decay", ["random", "bounded", "zero", "mixed"])
def test_decay_per_channel_equals_the_recurrence_in_float64(shape: Shape, keys: str, decay: str) -> None:
    document = documents_of(shape.rows, shape.tokens, 0.05)
    compare_by_channel(by_channel(shape, keys, decay), document)


@pytest.mark.parametrize("decay", ["random", "bounded", "mixed"])
def test_decay_per_channel_in_float32_is_close_to_float64(decay: str) -> None:
    shape = SHAPES[-1]
    document = documents_of(shape.rows, shape.tokens, 0.05)
    compare_by_channel(by_channel(shape, "random", decay, torch.float32), document)


def test_one_decay_for_all_channels_is_decay_per_head() -> None:
    inputs = inputs_of(SHAPES[-1], "random", "random")
    wide = [*inputs]
    wide[3] = inputs[3][..., None].expand(*inputs[3].shape, SHAPES[-1].key_dim)
    by_head = outputs_and_grads(lambda *x: gated_delta_rule(*x[:5], initial_state=x[5]), inputs)
    channels = outputs_and_grads(lambda *x: channel_delta_rule_chunked(*x[:5], initial_state=x[5]), wide)
    channels[5] = channels[5].sum(-1)
    assert_close(channels, by_head, LIMIT)


def test_states_carry_over_with_decay_per_channel() -> None:
    inputs = by_channel(Shape(2, 100, 2, 4, 6, 5), "random", "random")
    whole, last = gated_delta_rule(*inputs[:5], initial_state=inputs[5])
    head, middle = gated_delta_rule(*(x[:, :37] for x in inputs[:5]), initial_state=inputs[5])
    tail, end = gated_delta_rule(*(x[:, 37:] for x in inputs[:5]), initial_state=middle)
    assert_close([torch.cat([head, tail], 1), end], [whole, last], LIMIT)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda x: (x[0], x[1][:, :-1], *x[2:])),
        ("log_decay", lambda x: (x[0], x[1], x[2][:, :, :3], *x[3:])),
        ("log_decay", lambda x: (*x[:3], x[3][:, :, :1], x[4])),
        ("log_decay", lambda x: (*x[:3], x[3][..., None].expand(-1, -1, -1, 3), x[4])),
        ("beta", lambda x: (*x[:4], x[4][:, :1])),
        ("k", lambda x: (x[0], x[1].float(), *x[2:])),
        ("q", lambda x: tuple(part[:, :0] for part in x)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments_are_named(name: str, change) -> None:
    inputs = inputs_of(Shape(1, 8, 2, 4, 4, 4), "random", "random")[:5]
    with pytest.raises(Exception, match=name):
        gated_delta_rule(*change(tuple(inputs)))
