from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.linear_attention import linear_attention
from kernels.linear_attention.reference import linear_attention_recurrent
from kernels.linear_attention.shapes import SHAPES, Shape
from tests.closeness import assert_close, assert_true, outputs_and_grads

# The largest entry may differ by this much: 1e-10 is what float64 leaves after hundreds of products.
LIMIT = 1e-10
SPANS = ["head", "channel", "none"]


def inputs_of(shape: Shape, span: str, decay: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rows, tokens, key_heads, heads, key_dim, value_dim = shape
    q, k = torch.randn(2, rows, tokens, key_heads, key_dim, dtype=torch.float64)
    v = torch.randn(rows, tokens, heads, value_dim, dtype=torch.float64)
    state = torch.randn(rows, heads, key_dim, value_dim, dtype=torch.float64)
    inputs = [q, k, v, state]
    if span != "none":
        inputs.append(decays_of((rows, tokens, heads, key_dim)[: 3 + (span == "channel")], decay))
    return [x.to(dtype) for x in inputs]


def decays_of(shape: tuple[int, ...], kind: str) -> Tensor:
    """Log decays: mild; none at all; total; bounded as by a sigmoid; or all of these beside each other."""
    log_decay = -torch.rand(shape, dtype=torch.float64)
    if kind == "one":
        return torch.zeros_like(log_decay)
    if kind == "zero":
        return torch.full_like(log_decay, -1e4)
    if kind == "bounded":
        return 5.0 * log_decay
    if kind == "mixed":
        log_decay[:, ::3] = 0.0
        log_decay[:, 1::7] = float("-inf")
        log_decay[..., ::2] = 50.0 * log_decay[..., ::2]
    return log_decay


def documents_of(rows: int, tokens: int, starts: float) -> Tensor:
    return (torch.rand(rows, tokens) < starts).long().cumsum(1)


def compare(inputs: list[Tensor], document: Tensor | None) -> None:
    def results(rule, *inputs: Tensor) -> list[Tensor]:
        found = outputs_and_grads(
            lambda q, k, v, s, g=None: rule(q, k, v, g, document=document, initial_state=s), inputs
        )
        if len(inputs) == 5:
            # -inf has no finite neighbour: the gate's own gradient there is of no use and is not compared.
            found[6] = found[6].where(torch.isfinite(inputs[4]), 0.0)
        return found

    ours = results(linear_attention, *inputs)
    assert_true(ours, partial(results, linear_attention_recurrent), inputs, LIMIT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("decay", ["random", "one", "bounded", "mixed"])
def test_equals_the_recurrence_in_float64(shape: Shape, span: str, decay: str) -> None:
    inputs = inputs_of(shape, span, decay)
    compare(inputs, documents_of(shape.rows, shape.tokens, 0.05))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("decay", ["random", "bounded"])
def test_float32_is_close_to_float64(span: str, decay: str) -> None:
    shape = SHAPES[-1]
    inputs = inputs_of(shape, span, decay, torch.float32)
    compare(inputs, documents_of(shape.rows, shape.tokens, 0.05))


@given(
    tokens=st.integers(1, 150),
    key_heads=st.integers(1, 3),
    repeat=st.integers(1, 3),
    starts=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    span=st.sampled_from(SPANS),
    seed=st.integers(0, 2**20),
)
def test_equals_the_recurrence_for_any_shape_and_documents(
    tokens: int, key_heads: int, repeat: int, starts: float, span: str, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = inputs_of(Shape(2, tokens, key_heads, key_heads * repeat, 5, 3), span, "mixed")
    compare(inputs, documents_of(2, tokens, starts))


@pytest.mark.parametrize("span", ["head", "channel"])
def test_total_decay_leaves_each_token_alone(span: str) -> None:
    q, k, v, state, log_decay = inputs_of(Shape(1, 100, 2, 2, 6, 5), span, "zero")
    out, end = linear_attention(q, k, v, log_decay, initial_state=state)
    assert_close([out], [(q * k).sum(-1, keepdim=True) * v], LIMIT)
    assert_close([end], [k[:, -1, :, :, None] * v[:, -1, :, None]], LIMIT)


@pytest.mark.parametrize("span", ["head", "channel"])
def test_float32_stays_exact_after_a_strong_decay(span: str) -> None:
    # A float32 running sum of log decays loses the small gates that follow a large one.
    inputs = inputs_of(Shape(1, 128, 1, 1, 8, 8), span, "random", torch.float32)
    inputs[4] = torch.full_like(inputs[4], -1e-3)
    inputs[4][:, 5] = -900.0
    compare(inputs, None)


@pytest.mark.parametrize("span", ["head", "channel"])
def test_gradients_of_strong_decays_are_their_own(span: str) -> None:
    # Row sums less column sums of the pairs would leave the rounding of the products with themselves.
    inputs = inputs_of(Shape(1, 96, 1, 2, 8, 8), span, "random", torch.float32)
    inputs[4] = inputs[4] - 8.0
    compare(inputs, None)


@pytest.mark.parametrize("span", SPANS)
def test_states_carry_over_between_calls(span: str) -> None:
    q, k, v, state, *gates = inputs_of(Shape(2, 100, 2, 4, 6, 5), span, "random")
    parts = [q, k, v, *gates]
    whole, last = linear_attention(*parts, initial_state=state)
    head, middle = linear_attention(*(x[:, :37] for x in parts), initial_state=state)
    tail, end = linear_attention(*(x[:, 37:] for x in parts), initial_state=middle)
    assert_close([torch.cat([head, tail], 1), end], [whole, last], LIMIT)


@pytest.mark.parametrize("span", SPANS)
def test_another_document_changes_nothing_bit_for_bit(span: str) -> None:
    inputs = inputs_of(Shape(1, 100, 1, 2, 6, 5), span, "random", torch.float32)
    others = [x.clone() for x in inputs]
    document = ((torch.arange(100) >= 37).long() + (torch.arange(100) >= 70).long())[None]
    for x in (*others[:3], *others[4:]):
        x[:, 37:70] = -torch.rand_like(x[:, 37:70])

    def call(q, k, v, s, g=None):
        out = linear_attention(q, k, v, g, document=document, initial_state=s)[0]
        return torch.cat([out[:, :37], out[:, 70:]], dim=1)

    first, second = outputs_and_grads(call, inputs), outputs_and_grads(call, others)
    for a, b in zip(first, second, strict=True):
        if a.shape[1] == 100:
            assert torch.equal(b[:, 37:70], torch.zeros_like(b[:, 37:70]))
        assert torch.equal(a, b)


def test_bfloat16_in_bfloat16_out_with_a_float32_state() -> None:
    q, k, v, _, log_decay = inputs_of(Shape(1, 40, 1, 2, 6, 5), "channel", "random", torch.bfloat16)
    for gates in (log_decay, log_decay[..., 0], None):
        out, state = linear_attention(q, k, v, gates)
        assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda x: (x[0], x[1][:, :-1], *x[2:])),
        ("log_decay", lambda x: (x[0], x[1], x[2][:, :, :3], *x[3:])),
        ("log_decay", lambda x: (*x[:3], x[3][:, :, :1])),
        ("k", lambda x: (x[0], x[1].float(), *x[2:])),
        ("q", lambda x: tuple(part[:, :0] for part in x)),
    ],
)
@pytest.mark.parametrize("span", ["head", "channel"])
def test_wrong_arguments_are_named(name: str, change, span: str) -> None:
    q, k, v, _, log_decay = inputs_of(Shape(1, 8, 2, 4, 4, 4), span, "random")
    with pytest.raises(Exception, match=name):
        linear_attention(*change((q, k, v, log_decay)))
