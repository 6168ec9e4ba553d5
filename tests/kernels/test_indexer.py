from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention.reference import Pattern, attention_direct
from kernels.indexer import index_loss, index_loss_of_chosen, index_select
from kernels.indexer import loss as losses
from kernels.indexer import reference as forms
from kernels.indexer.loss import index_loss_direct
from kernels.indexer.reference import choose_directly, pool_keys, pool_selection, visible_entries
from kernels.indexer.shapes import SHAPES, Shape
from tests.closeness import assert_close, assert_rounded, outputs_and_grads, with_grads


def inputs_of(case: Shape, entries: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    q = torch.randn(case.rows, case.tokens, case.index_heads, case.index_dim, dtype=dtype)
    k = torch.randn(case.rows, entries, case.index_dim, dtype=dtype)
    return [q, k, torch.randn(case.rows, case.tokens, case.index_heads, dtype=dtype)]


def documents_of(rows: int, tokens: int, starts: float) -> tuple[Tensor, Tensor]:
    """Document numbers, and the position of each token in its document."""
    document = (torch.rand(rows, tokens) < starts).long().cumsum(1)
    is_start = torch.nn.functional.pad(document.diff(dim=1) != 0, (1, 0), value=True)
    index = torch.arange(tokens).expand(rows, -1)
    return document, index - torch.where(is_start, index, 0).cummax(1).values


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.1])
@pytest.mark.parametrize("scores", [1, 500, 2**22])
@pytest.mark.parametrize("has_ties", [False, True])
def test_blocks_choose_what_a_stable_sort_does(case, starts, scores, has_ties, monkeypatch) -> None:
    monkeypatch.setattr(forms, "SCORES", scores)
    inputs = inputs_of(case, case.tokens)
    if has_ties:
        inputs = [x.round() for x in inputs]  # small whole numbers: many equal scores, exact sums
    document = documents_of(case.rows, case.tokens, starts)[0] if starts else None
    ours = index_select(*inputs, top_k=case.top_k, document=document)
    assert torch.equal(ours, choose_directly(*inputs, top_k=case.top_k, document=document))
    own = torch.arange(case.tokens) if document is None else documents_positions(document)
    assert torch.equal((ours >= 0).sum(-1), (own + 1).clamp(max=case.top_k).expand(case.rows, -1))


def documents_positions(document: Tensor) -> Tensor:
    same = document[:, :, None] == document[:, None, :]
    return same.tril().sum(-1) - 1


@given(
    tokens=st.integers(1, 40),
    size=st.sampled_from([1, 2, 5, 16]),
    starts=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_pools_are_whole_runs_of_one_document(tokens: int, size: int, starts: float, seed: int) -> None:
    torch.manual_seed(seed)
    document, position = documents_of(2, tokens, starts)
    k, gates = torch.randn(2, 2, tokens, 3, dtype=torch.float64)
    position_bias = torch.randn(size, 3, dtype=torch.float64)

    def by_hand(k, gates, position_bias):
        pooled = []
        for b in range(2):
            for t in range(tokens):
                if int(position[b, t]) % size == size - 1:
                    run = slice(t - size + 1, t + 1)
                    pooled.append(((gates[b, run] + position_bias).softmax(0) * k[b, run]).sum(0))
        return torch.stack(pooled) if pooled else (k[:, :0] * gates.sum() * position_bias.sum()).flatten(0, 1)

    def ours(k, gates, position_bias):
        pooled, last = pool_keys(k, gates, position_bias, position)
        return pooled[last >= 0]

    inputs = [k, gates, position_bias]
    assert_close(outputs_and_grads(ours, inputs), outputs_and_grads(by_hand, inputs), 1e-12)
    last = pool_keys(k, gates, position_bias, position)[1]
    visible = visible_entries(0, tokens, last, document)
    chosen = torch.where(visible, torch.arange(last.shape[1]), -1)
    selection = pool_selection(chosen, last, position, size)
    for b in range(2):
        for t in range(tokens):
            expected = [s for s in range(t + 1) if document[b, s] == document[b, t]]
            assert sorted(s for s in selection[b, t].tolist() if s >= 0) == expected


def compare(loss: Callable[..., Tensor], direct: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    found, expected = outputs_and_grads(loss, inputs), with_grads(direct)
    if found[0].dtype == torch.float32:
        assert_rounded(found, expected, inputs)
    else:
        # One entry or one query leaves nothing to learn: all of it is rounding around zero.
        for a, b in zip(found, expected(*inputs), strict=True):
            assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max().item())


def attention_of(case: Shape, document: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, log-sum-exp, and the weights summed over heads, of an attention."""
    q = torch.randn(case.rows, case.tokens, case.heads, case.key_dim, dtype=torch.float64)
    k = torch.randn(case.rows, case.tokens, 1, case.key_dim, dtype=torch.float64)
    eye = torch.eye(case.tokens, dtype=torch.float64).expand(case.rows, -1, -1)[:, :, None]
    weights, lse = attention_direct(q, k, eye, scale=0.5, pattern=Pattern(), document=document)
    return q, k, lse, weights.sum(2)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_loss_equals_direct(case, starts, size, dtype, monkeypatch) -> None:
    monkeypatch.setattr(losses, "SCORES", 700)
    document, position = documents_of(case.rows, case.tokens, starts)
    attention_q, attention_k, lse, weights = attention_of(case, document)
    last, entries = None, case.tokens
    if size > 1:
        zeros = torch.zeros(case.rows, case.tokens, 1)
        last = pool_keys(zeros, zeros, torch.zeros(size, 1), position)[1]
        entries = last.shape[1]
        runs = [last - shift for shift in range(size)]
        taken = [weights.gather(2, run.clamp(min=0)[:, None].expand(-1, case.tokens, -1)) for run in runs]
        weights = torch.stack(taken).sum(0)
    inputs = inputs_of(case, entries, dtype)
    last_token = torch.arange(entries).expand(case.rows, -1) if last is None else last
    visible = visible_entries(0, case.tokens, last_token, document)

    def ours(q, k, w):
        whole = (x.to(dtype) for x in (attention_q, attention_k, lse))
        return index_loss(q, k, w, *whole, scale=0.5, last=last, size=size, document=document)

    compare(ours, lambda q, k, w: index_loss_direct(q, k, w, weights, visible), inputs)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_of_chosen_equals_direct(case, dtype, monkeypatch) -> None:
    monkeypatch.setattr(losses, "SCORES", 700)
    document = documents_of(case.rows, case.tokens, 0.1)[0]
    weights = attention_of(case, document)[3]
    inputs = inputs_of(case, case.tokens, dtype)
    entries = index_select(*inputs, top_k=case.top_k, document=document)
    is_chosen = torch.zeros(case.rows, case.tokens, case.tokens + 1, dtype=torch.bool)
    is_chosen = is_chosen.scatter(2, torch.where(entries < 0, case.tokens, entries), True)[..., :-1]
    shares = weights.gather(2, entries.clamp(min=0)).masked_fill(entries < 0, 0.0)
    compare(
        lambda q, k, w: index_loss_of_chosen(q, k, w, entries, shares),
        lambda q, k, w: index_loss_direct(q, k, w, weights, is_chosen),
        inputs,
    )


def test_a_perfect_indexer_has_no_loss() -> None:
    # One head with positive keys: the score is the target's logarithm up to a constant.
    q, k = torch.rand(2, 1, 12, 4, dtype=torch.float64)
    scores = (q @ k.mT).masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf"))
    lse = scores.logsumexp(-1)[..., None]
    q, ones = q[:, :, None], torch.ones(1, 12, 1, dtype=torch.float64)
    loss = index_loss(q, k, ones, q, k[:, :, None], lse, scale=1.0)
    assert loss.abs() < 1e-12


@pytest.mark.parametrize("name", ["k", "weights", "document", "top_k"])
def test_wrong_arguments_are_named(name: str) -> None:
    q, k, weights = inputs_of(Shape(1, 8, 2, 4, 1, 4, 3), 8)
    document = torch.zeros(1, 7, dtype=torch.long) if name == "document" else None
    k = k[:, :-1] if name == "k" else k
    weights = weights[:, :, :1] if name == "weights" else weights
    with pytest.raises(Exception, match=name):
        index_select(q, k, weights, top_k=0 if name == "top_k" else 3, document=document)
