import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention import CASES, Case, attention
from kernels.attention.reference import attention_direct
from tests.closeness import assert_close, outputs_and_grads


def inputs_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    rows, tokens, heads, key_heads, key_dim, value_dim, _ = case
    shapes = ((heads, key_dim), (key_heads, key_dim), (key_heads, value_dim))
    return [torch.randn(rows, tokens, *shape, dtype=dtype) for shape in shapes]


def one_query_at_a_time(q, k, v, *, scale, window, document):
    rows, tokens, heads, _ = q.shape
    repeat = heads // k.shape[2]
    out = []
    for b in range(rows):
        for t in range(tokens):
            first = 0 if window is None else max(0, t - window + 1)
            keys = [s for s in range(first, t + 1) if document is None or document[b, s] == document[b, t]]
            for h in range(heads):
                scores = torch.stack([q[b, t, h] @ k[b, s, h // repeat] * scale for s in keys])
                values = torch.stack([v[b, s, h // repeat] for s in keys])
                out.append(scores.softmax(0) @ values)
    return torch.stack(out).view(rows, tokens, heads, -1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("has_documents", [False, True])
def test_fused_equals_direct(case: Case, has_documents: bool) -> None:
    document = (torch.rand(case.rows, case.tokens) < 0.1).long().cumsum(1) if has_documents else None
    options = {"scale": 0.3, "window": case.window, "document": document}
    inputs = inputs_of(case, torch.float64)
    fused = outputs_and_grads(lambda *x: attention(*x, **options), inputs)
    direct = outputs_and_grads(lambda *x: attention_direct(*x, **options), inputs)
    assert_close(fused, direct, 1e-12)


@given(
    tokens=st.integers(1, 12),
    window=st.none() | st.integers(1, 14),
    group=st.integers(1, 3),
    starts=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_direct_equals_one_query_at_a_time(
    tokens: int, window: int | None, group: int, starts: float, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = inputs_of(Case(2, tokens, 2 * group, 2, 3, 5, window), torch.float64)
    document = (torch.rand(2, tokens) < starts).long().cumsum(1)
    options = {"scale": 0.7, "window": window, "document": document}
    direct = outputs_and_grads(lambda *x: attention_direct(*x, **options), inputs)
    slow = outputs_and_grads(lambda *x: one_query_at_a_time(*x, **options), inputs)
    assert_close(direct, slow, 1e-12)
