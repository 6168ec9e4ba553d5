"""Queries at some places among the keys get what they get among all queries, and so do their gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import attention, attention_with_lse
from kernels.attention import reference as attention_forms
from kernels.block_selection import reference as selection_forms
from kernels.block_selection import select_by_mean, select_by_peak
from kernels.document_windows import document_windows
from kernels.places import spans

ROWS, KEYS = 2, 41


class Row(NamedTuple):
    """Packed rows, and places of queries in each."""

    document: Tensor
    position: Tensor
    places: Tensor


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Rows packed differently; queries are any tokens in order, or two stretches of the same in all rows."""
    starts = torch.tensor(
        [[draw(st.booleans()) and draw(st.booleans()) for _ in range(KEYS)] for _ in range(ROWS)]
    )
    document = starts.long().cumsum(1)
    index = torch.arange(KEYS).expand(ROWS, -1)
    is_start = torch.nn.functional.pad(document.diff(dim=1) != 0, (1, 0), value=True)
    position = index - torch.where(is_start, index, 0).cummax(1).values
    count = draw(st.integers(1, KEYS))
    if draw(st.booleans()):
        front = draw(st.integers(0, KEYS - count))
        behind = draw(st.integers(0, KEYS - count - front))
        own = torch.cat([torch.arange(front), KEYS - behind + torch.arange(behind)])
        own = own if len(own) else torch.tensor([KEYS - 1])
        return Row(document, position, own.expand(ROWS, -1))
    drawn = [sorted(draw(st.permutations(range(KEYS)))[:count]) for _ in range(ROWS)]
    return Row(document, position, torch.tensor(drawn))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def taken(x: Tensor, places: Tensor) -> Tensor:
    """[B S ...] at the places."""
    index = places.view(*places.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def compare(
    function: Callable[..., Any], queries: list[Tensor], keys: list[Tensor], places: Tensor, limit: float = 1e-12
) -> None:
    """`function(queries, keys, places)`, tensors or a tuple, at places and of all indexed at the places.

    What has no dim of queries is compared as it is.
    """
    results = []
    for is_cut in (True, False):
        leaves = [x.clone().requires_grad_() for x in (*queries, *keys)]
        own, others = leaves[: len(queries)], leaves[len(queries) :]
        if is_cut:
            outs = function([taken(x, places) for x in own], others, places)
        else:
            outs = function(own, others, None)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if not is_cut:
            outs = tuple(taken(x, places) for x in outs)
        floating = [x for x in outs if x.requires_grad]
        total = sum((x * normal(*x.shape, seed=5)).sum() for x in floating)
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if floating else ()
        results.append((outs, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=False)]))
    for ours, reference in zip(results[0][0] + tuple(results[0][1]), results[1][0] + tuple(results[1][1]), strict=True):
        assert ours.shape == reference.shape
        if not ours.is_floating_point():
            assert torch.equal(ours, reference)
        else:
            torch.testing.assert_close(ours, reference, rtol=limit, atol=limit)


PATTERNS = ({}, {"window": 5}, {"window": 12, "block": 4}, {"window": 8, "block": 4, "first": 6})
QUICK = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("size", [3, 128])
@given(row=rows())
@QUICK
def test_attention(pattern: dict[str, int], size: int, row: Row) -> None:
    q, k, v = normal(ROWS, KEYS, 4, 3), normal(ROWS, KEYS, 2, 3, seed=1), normal(ROWS, KEYS, 2, 5, seed=2)
    sinks = normal(4, seed=3)
    options = {"scale": 0.4, "document": row.document, "position": row.position, "logit_cap": 3.0, **pattern}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_forms, "QUERIES", size)
        compare(
            lambda q, k, places: attention_with_lse(*q, *k[:2], sinks=k[2], places=places, **options),
            [q],
            [k, v, sinks],
            row.places,
        )


@given(row=rows())
@QUICK
def test_full_attention_without_documents(row: Row) -> None:
    q, k, v = normal(ROWS, KEYS, 4, 3), normal(ROWS, KEYS, 2, 3, seed=1), normal(ROWS, KEYS, 2, 3, seed=2)
    compare(lambda q, k, places: attention(*q, *k, scale=0.4, places=places), [q], [k, v], row.places)


def test_a_span_reads_no_gap_between_far_queries() -> None:
    places = torch.cat([torch.arange(10), 1000 + torch.arange(10)]).expand(2, -1)
    assert [tuple(span) for span in spans(places, 20, 8)] == [
        (0, 8, 0, 8),
        (8, 10, 8, 10),
        (10, 18, 1000, 1008),
        (18, 20, 1008, 1010),
    ]
    assert [tuple(span) for span in spans(None, 5, 3)] == [(0, 3, 0, 3), (3, 5, 3, 5)]
