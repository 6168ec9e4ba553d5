import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention.reference import Pattern, attention_direct
from kernels.selected_attention import reference as forms
from kernels.selected_attention import selected_attention, selected_attention_with_shares
from kernels.selected_attention.reference import selected_attention_direct
from kernels.selected_attention.shapes import SHAPES, Shape
from tests.closeness import assert_close, assert_true, outputs_and_grads, with_grads


def inputs_of(case: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    rows, tokens, heads, key_heads, key_dim, value_dim = case[:6]
    shapes = ((heads, key_dim), (key_heads, key_dim), (key_heads, value_dim))
    return [torch.randn(rows, tokens, *shape, dtype=dtype) for shape in shapes]


def selection_of(case: Shape) -> torch.Tensor:
    """Distinct earlier tokens in no order, the query's own among them, -1 for the rest."""
    scores = torch.rand(case.rows, case.tokens, case.tokens).tril()
    scores += torch.eye(case.tokens)
    count = min(case.chosen, case.tokens)
    best = scores.topk(count, dim=-1)
    return torch.where(best.values > 0, best.indices, -1)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("gathered", [1, 2000, 2**22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gathered_equals_direct(case, has_sinks, gathered, dtype, monkeypatch) -> None:
    monkeypatch.setattr(forms, "GATHERED", gathered)
    selection = selection_of(case)
    inputs = inputs_of(case, dtype) + ([torch.randn(case.heads, dtype=dtype)] if has_sinks else [])

    def call(form):
        return lambda q, k, v, sinks=None: form(q, k, v, selection, scale=0.4, sinks=sinks)[0]

    ours = outputs_and_grads(call(selected_attention_with_shares), inputs)
    direct = with_grads(call(selected_attention_direct))
    assert_true(ours, direct, inputs, 1e-11)
    shares = selected_attention_with_shares(*inputs[:3], selection, scale=0.4)[1]

    def their_shares(q, k, v) -> list[torch.Tensor]:
        return [selected_attention_direct(q, k, v, selection, scale=0.4)[1]]

    assert_true([shares], their_shares, inputs[:3], 1e-11)
    assert_true([shares.sum(-1)], lambda: [torch.full(shares.shape[:2], float(case.heads))], [], 1e-11)


@given(tokens=st.integers(1, 20), group=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_all_earlier_keys_are_full_attention(tokens: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = inputs_of(Shape(2, tokens, 2 * group, 2, 3, 4, tokens), torch.float64)
    index = torch.arange(tokens)
    selection = torch.where(index[:, None] >= index, index, -1).expand(2, -1, -1)
    ours = outputs_and_grads(lambda q, k, v: selected_attention(q, k, v, selection, scale=0.6), inputs)
    full = outputs_and_grads(lambda *x: attention_direct(*x, scale=0.6, pattern=Pattern())[0], inputs)
    assert_close(ours, full, 1e-12)


def test_nothing_chosen_is_zero_and_a_stranger_is_never_read() -> None:
    inputs = inputs_of(Shape(1, 6, 2, 1, 4, 4, 3), torch.float64)
    selection = torch.tensor([-1, 1, 2, 3, 4, 5])[None, :, None].repeat(1, 1, 3)
    selection[..., 1:] = -1
    for x in inputs[1:]:
        x[:, 0] = float("nan")
    q, k, v = (x.requires_grad_() for x in inputs)
    out, shares = selected_attention_with_shares(q, k, v, selection, scale=1.0)
    assert torch.isfinite(out[:, 1:]).all()
    assert torch.equal(shares[:, 1:, 0], torch.full((1, 5), 2.0, dtype=torch.float64))
    out[:, 1:].sum().backward()
    assert all(torch.isfinite(x.grad[:, 1:]).all() for x in (q, k, v) if x.grad is not None)
    empty = torch.full((1, 6, 2), -1)
    q, k, v = (torch.ones_like(x) for x in inputs)
    out, shares = selected_attention_with_shares(q, k, v, empty, scale=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(shares, torch.zeros_like(shares))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda x: (x[0], x[1][..., :-1], *x[2:])),
        ("v", lambda x: (*x[:2], x[2][:, :, :, :0].expand(1, 8, 0, 0), x[3])),
        ("selection", lambda x: (*x[:3], x[3][:, :2])),
    ],
)
def test_wrong_arguments_are_named(name: str, change) -> None:
    case = Shape(1, 8, 2, 1, 4, 4, 3)
    with pytest.raises(Exception, match=name):
        selected_attention(*change((*inputs_of(case, torch.float32), selection_of(case))), scale=1.0)
