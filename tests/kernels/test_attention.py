import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention import attention, attention_with_lse
from kernels.attention import reference as forms
from kernels.attention.reference import Pattern, attention_blocked, attention_direct
from kernels.attention.shapes import SHAPES, Shape
from tests.closeness import assert_close, assert_true, outputs_and_grads, with_grads


def inputs_of(case: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    rows, tokens, heads, key_heads, key_dim, value_dim, _ = case
    shapes = ((heads, key_dim), (key_heads, key_dim), (key_heads, value_dim))
    return [torch.randn(rows, tokens, *shape, dtype=dtype) for shape in shapes]


def documents_of(rows: int, tokens: int, starts: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Document numbers, and the position of each token in its document."""
    document = (torch.rand(rows, tokens) < starts).long().cumsum(1)
    is_start = torch.nn.functional.pad(document.diff(dim=1) != 0, (1, 0), value=True)
    index = torch.arange(tokens).expand(rows, -1)
    return document, index - torch.where(is_start, index, 0).cummax(1).values


def one_query_at_a_time(q, k, v, sinks, *, scale, pattern, logit_cap, document, position):
    rows, tokens, heads, _ = q.shape
    repeat = heads // k.shape[2]
    window, block, first = pattern
    out = []
    for b in range(rows):
        for t in range(tokens):
            keys = []
            for s in range(t + 1):
                blocks = int(position[b, t]) // block - int(position[b, s]) // block
                is_near = window is None or blocks < window // block or position[b, s] < first
                if is_near and document[b, s] == document[b, t]:
                    keys.append(s)
            for h in range(heads):
                scores = torch.stack([q[b, t, h] @ k[b, s, h // repeat] * scale for s in keys])
                if logit_cap is not None:
                    scores = logit_cap * (scores / logit_cap).tanh()
                scores = torch.cat([scores, sinks[h : h + 1]])
                values = torch.stack([v[b, s, h // repeat] for s in keys])
                out.append(scores.softmax(0)[:-1] @ values)
    return torch.stack(out).view(rows, tokens, heads, -1)


PATTERNS = (Pattern(), Pattern(5), Pattern(12, 4), Pattern(8, 4, 3), Pattern(6, 1, 9))


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_public_form_equals_direct(case, has_documents, has_sinks, dtype) -> None:
    document, position = documents_of(case.rows, case.tokens, 0.05) if has_documents else (None, None)
    sinks = [torch.randn(case.heads, dtype=dtype)] if has_sinks else []
    inputs = inputs_of(case, dtype) + sinks
    options = {"scale": 0.3, "document": document, "position": position}

    def ours(q, k, v, sinks=None):
        return attention(q, k, v, sinks=sinks, window=case.window, **options)

    def direct(q, k, v, sinks=None):
        return attention_direct(q, k, v, sinks=sinks, pattern=Pattern(case.window), **options)[0]

    assert_true(outputs_and_grads(ours, inputs), with_grads(direct), inputs, 1e-11)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("queries", [1, 8, 128])
@pytest.mark.parametrize("logit_cap", [None, 2.0])
@pytest.mark.parametrize("starts", [0.0, 0.05, 0.4])
def test_blocked_equals_direct(pattern, queries, logit_cap, starts, monkeypatch) -> None:
    monkeypatch.setattr(forms, "QUERIES", queries)
    document, position = documents_of(2, 67, starts)
    inputs = [*inputs_of(Shape(2, 67, 6, 2, 4, 3, None), torch.float64), torch.randn(6, dtype=torch.float64)]
    options = {"scale": 0.7, "pattern": pattern, "logit_cap": logit_cap}
    options |= {"document": document, "position": position} if starts else {}
    blocked = outputs_and_grads(lambda *x: attention_blocked(*x[:3], sinks=x[3], **options), inputs)
    direct = outputs_and_grads(lambda *x: attention_direct(*x[:3], sinks=x[3], **options), inputs)
    assert_close(blocked, direct, 1e-11)


@given(
    tokens=st.integers(1, 12),
    pattern=st.sampled_from([Pattern(), Pattern(1), Pattern(4), Pattern(6, 3), Pattern(2, 2, 3)]),
    group=st.integers(1, 3),
    logit_cap=st.sampled_from([None, 1.5]),
    starts=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_direct_equals_one_query_at_a_time(tokens, pattern, group, logit_cap, starts, seed) -> None:
    torch.manual_seed(seed)
    document, position = documents_of(2, tokens, starts)
    sinks = torch.randn(2 * group, dtype=torch.float64)
    inputs = [*inputs_of(Shape(2, tokens, 2 * group, 2, 3, 5, None), torch.float64), sinks]
    options = {"scale": 0.7, "pattern": pattern, "logit_cap": logit_cap}
    options |= {"document": document, "position": position}
    direct = outputs_and_grads(lambda *x: attention_direct(*x[:3], sinks=x[3], **options)[0], inputs)
    slow = outputs_and_grads(lambda *x: one_query_at_a_time(*x, **options), inputs)
    assert_close(direct, slow, 1e-12)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e3])
def test_scores_of_any_size(size: float) -> None:
    inputs = [x * size for x in inputs_of(Shape(1, 200, 2, 1, 8, 8, None), torch.float64)]
    ours = outputs_and_grads(lambda *x: attention_with_lse(*x, scale=1.0, window=50), inputs)
    direct = outputs_and_grads(lambda *x: attention_direct(*x, scale=1.0, pattern=Pattern(50)), inputs)
    assert_close(ours, direct, 1e-10)


def test_far_sinks_take_all_or_nothing() -> None:
    inputs = inputs_of(Shape(1, 20, 2, 2, 4, 4, None), torch.float64)
    plain = attention(*inputs, scale=0.5)
    assert_close([attention(*inputs, scale=0.5, sinks=torch.full((2,), -1e4).double())], [plain], 1e-12)
    swallowed = attention(*inputs, scale=0.5, sinks=torch.full((2,), 1e4).double())
    assert torch.equal(swallowed, torch.zeros_like(swallowed))


def test_bfloat16_in_and_out_is_computed_in_float32() -> None:
    inputs = inputs_of(Shape(1, 150, 4, 2, 16, 8, None), torch.bfloat16)
    ours = attention(*inputs, scale=0.25, window=20)
    exact = attention_direct(*(x.double() for x in inputs), scale=0.25, pattern=Pattern(20))[0]
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {"window": 0}),
        ("block", {"window": 10, "block": 4}),
        ("sinks", {"sinks": torch.zeros(3)}),
        ("logit_cap", {"logit_cap": 0.0}),
        ("position", {"window": 4, "block": 4, "document": torch.zeros(1, 8, dtype=torch.long)}),
    ],
)
def test_wrong_arguments_are_named(name: str, options) -> None:
    inputs = inputs_of(Shape(1, 8, 2, 2, 4, 4, None), torch.float32)
    with pytest.raises(Exception, match=name):
        attention(*inputs, scale=1.0, **options)
