"""Queries that are some tokens of a row get what they get among all of them, and so do their gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import attention, attention_with_lse
from kernels.attention import reference as attention_forms
from kernels.block_attention import block_attention
from kernels.block_attention import reference as block_forms
from kernels.block_selection import reference as selection_forms
from kernels.block_selection import select_by_max, select_by_mean
from kernels.compressed_attention import entries as entry_forms
from kernels.compressed_attention import entry_attention, joint_attention, select_by_entries
from kernels.compressed_attention import joint as joint_forms
from kernels.document_windows import document_windows
from kernels.indexer import index_loss, index_select, pool_keys, pool_selection
from kernels.indexer import loss as loss_forms
from kernels.indexer import reference as index_forms
from kernels.query_index import at_queries, query_chunks

ROWS, KEYS = 2, 41


class Row(NamedTuple):
    """Packed rows, and the index of each query in its row."""

    document: Tensor
    position: Tensor
    q_index: Tensor


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Rows packed differently; queries are any tokens in order, or two runs that are the same in all rows."""
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
        queries = torch.cat([torch.arange(front), KEYS - behind + torch.arange(behind)])
        queries = queries if len(queries) else torch.tensor([KEYS - 1])
        return Row(document, position, queries.expand(ROWS, -1))
    drawn = [sorted(draw(st.permutations(range(KEYS)))[:count]) for _ in range(ROWS)]
    return Row(document, position, torch.tensor(drawn))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def taken(x: Tensor, q_index: Tensor) -> Tensor:
    """[B S ...] at the queries."""
    index = q_index.view(*q_index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def compare(
    function: Callable[..., Any],
    queries: list[Tensor],
    keys: list[Tensor],
    q_index: Tensor,
    limit: float = 1e-12,
) -> None:
    """`function(queries, keys, q_index)`, a tensor or a tuple: of the queries alone, and of all indexed.

    What has no dim of queries is compared as it is.
    """
    results = []
    for is_cut in (True, False):
        leaves = [x.clone().requires_grad_() for x in (*queries, *keys)]
        own, others = leaves[: len(queries)], leaves[len(queries) :]
        if is_cut:
            outs = function([taken(x, q_index) for x in own], others, q_index)
        else:
            outs = function(own, others, None)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if not is_cut:
            outs = tuple(taken(x, q_index) for x in outs)
        floating = [x for x in outs if x.requires_grad]
        total = sum((x * normal(*x.shape, seed=5)).sum() for x in floating)
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if floating else ()
        results.append(
            (outs, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=False)])
        )
    for ours, reference in zip(
        results[0][0] + tuple(results[0][1]), results[1][0] + tuple(results[1][1]), strict=True
    ):
        assert ours.shape == reference.shape
        if not ours.is_floating_point():
            assert torch.equal(ours, reference)
        else:
            torch.testing.assert_close(ours, reference, rtol=limit, atol=limit)


PATTERNS = ({}, {"window": 5}, {"window": 12, "block": 4}, {"window": 8, "block": 4, "first": 6})
QUICK = settings(max_examples=12, deadline=None)


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
            lambda q, k, q_index: attention_with_lse(*q, *k[:2], sinks=k[2], q_index=q_index, **options),
            [q],
            [k, v, sinks],
            row.q_index,
        )


@given(row=rows())
@QUICK
def test_full_attention_without_documents(row: Row) -> None:
    q, k, v = normal(ROWS, KEYS, 4, 3), normal(ROWS, KEYS, 2, 3, seed=1), normal(ROWS, KEYS, 2, 3, seed=2)
    compare(lambda q, k, q_index: attention(*q, *k, scale=0.4, q_index=q_index), [q], [k, v], row.q_index)


def test_a_chunk_reads_no_gap_between_distant_queries() -> None:
    q_index = torch.cat([torch.arange(10), 1000 + torch.arange(10)]).expand(2, -1)
    assert [tuple(chunk) for chunk in query_chunks(q_index, 20, 8)] == [
        (0, 8, 0, 8),
        (8, 10, 8, 10),
        (10, 18, 1000, 1008),
        (18, 20, 1008, 1010),
    ]
    assert [tuple(chunk) for chunk in query_chunks(None, 5, 3)] == [(0, 3, 0, 3), (3, 5, 3, 5)]


CHUNK_SIZES = pytest.mark.parametrize("chunk_elements", [1, 1 << 22])


@pytest.mark.parametrize("selectors", [2, 4])
@CHUNK_SIZES
@given(row=rows())
@QUICK
def test_block_attention(chunk_elements: int, selectors: int, row: Row) -> None:
    q, k, v = normal(ROWS, KEYS, 4, 3), normal(ROWS, KEYS, 2, 3, seed=1), normal(ROWS, KEYS, 2, 5, seed=2)
    windows = document_windows(row.position, 4, 4)
    scores = normal(ROWS, KEYS, selectors, windows.start.shape[1], seed=3)
    selected = windows.choose(scores, row.position, count=3)

    def run(q: list[Tensor], k: list[Tensor], q_index: Tensor | None) -> tuple[Tensor, ...]:
        own = selected if q_index is None else taken(selected, q_index)
        return block_attention(*q, *k, own, scale=0.4, block=4, position=row.position, q_index=q_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_forms, "CHUNK_ELEMENTS", chunk_elements)
        compare(run, [q], [k, v], row.q_index)


@CHUNK_SIZES
@given(row=rows())
@QUICK
def test_block_selection(chunk_elements: int, row: Row) -> None:
    q, k = normal(ROWS, KEYS, 4, 3), normal(ROWS, KEYS, 2, 3, seed=1)
    options = {"block": 4, "count": 3, "position": row.position}
    windows = document_windows(row.position, 4, 4)

    def best_keys(q: list[Tensor], k: list[Tensor], q_index: Tensor | None) -> tuple[Tensor, Tensor]:
        selected, best = select_by_max(*q, k[0][:, :, :1], local=1, q_index=q_index, **options)
        # The best key of no block is any.
        return selected, torch.cat([best[..., :1], best[..., 1:].masked_fill(selected < 0, 0)], dim=-1)

    assert windows.start.shape[1] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_forms, "CHUNK_ELEMENTS", chunk_elements)
        compare(
            lambda q, k, q_index: select_by_mean(*q, *k, q_index=q_index, **options), [q], [k], row.q_index
        )
        compare(best_keys, [q], [k], row.q_index)


@CHUNK_SIZES
@given(row=rows())
@QUICK
def test_entry_attention(chunk_elements: int, row: Row) -> None:
    entries, blocks = document_windows(row.position, 4, 2), document_windows(row.position, 4, 4)
    slots, q = entries.start.shape[1], normal(ROWS, KEYS, 4, 3)
    k, v = normal(ROWS, slots, 2, 3, seed=1), normal(ROWS, slots, 2, 5, seed=2)
    options = {"entries": entries, "blocks": blocks, "position": row.position, "scale": 0.4}
    options |= {"count": 3, "initial": 1, "local": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry_forms, "CHUNK_ELEMENTS", chunk_elements)
        compare(
            lambda q, k, q_index: entry_attention(*q, *k, q_index=q_index, **options),
            [q],
            [k, v],
            row.q_index,
        )
        compare(
            lambda q, k, q_index: select_by_entries(*q, *k, q_index=q_index, **options), [q], [k], row.q_index
        )


@pytest.mark.parametrize("chosen", [None, 3])
@CHUNK_SIZES
@given(row=rows(), before=st.integers(0, 9))
@QUICK
def test_joint_attention(chunk_elements: int, chosen: int | None, row: Row, before: int) -> None:
    windows = document_windows(row.position, 4, 4)
    slots, window = windows.start.shape[1], 6
    q, kv, sinks = normal(ROWS, KEYS, 4, 3), normal(ROWS, KEYS, 3, seed=1), normal(4, seed=3)
    entries = normal(ROWS, slots, 3, seed=2)
    selected = None
    if chosen is not None:
        scores = normal(ROWS, KEYS, 1, slots, seed=4)
        selected = windows.choose(scores, row.position, count=chosen)[:, :, 0]

    def run(q: list[Tensor], keys: list[Tensor], q_index: Tensor | None) -> tuple[Tensor, ...]:
        kv, entries, sinks = keys
        options = {"windows": windows, "scale": 0.4, "window": window}
        if q_index is None:
            return joint_attention(q[0], kv, entries, sinks, selected, position=row.position, **options)
        # The raw keys lie further back in a row of their own.
        kv = torch.nn.functional.pad(kv, (0, 0, before, 0), value=7.0)
        own = None if selected is None else taken(selected, q_index)
        options |= {"q_index": q_index + before, "token_index": q_index}
        return joint_attention(
            q[0], kv, entries, sinks, own, position=at_queries(row.position, q_index), **options
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_forms, "CHUNK_ELEMENTS", chunk_elements)
        compare(run, [q], [kv, entries, sinks], row.q_index)


@pytest.mark.parametrize("size", [1, 3])
@CHUNK_SIZES
@given(row=rows())
@QUICK
def test_indexer(chunk_elements: int, size: int, row: Row) -> None:
    q, weights = normal(ROWS, KEYS, 2, 3), normal(ROWS, KEYS, 2, seed=1)
    attention_q, attention_k = normal(ROWS, KEYS, 4, 3, seed=2), normal(ROWS, KEYS, 2, 3, seed=3)
    k, gates, bias = normal(ROWS, KEYS, 3, seed=4), normal(ROWS, KEYS, 3, seed=5), normal(size, 3, seed=6)
    last, pooled = None, k
    if size > 1:
        pooled, last = pool_keys(k, gates, bias, row.position)
    options = {"last": last, "document": row.document}

    def select(q: list[Tensor], k: list[Tensor], q_index: Tensor | None) -> Tensor:
        chosen = index_select(q[0], k[0], q[1], top_k=3, q_index=q_index, **options)
        if last is None:
            return chosen
        return pool_selection(chosen, last, at_queries(row.position, q_index), size, q_index)

    def loss(q_index: Tensor | None) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, pooled, weights)]
        queries = leaves[0], leaves[2], attention_q
        _, lse = attention_with_lse(attention_q, attention_k, attention_k, scale=0.4, document=row.document)
        # Queries that are not asked about weigh nothing: their log-sum-exp makes their shares zero.
        if q_index is None:
            is_asked = torch.zeros(ROWS, KEYS, dtype=torch.bool).scatter(1, row.q_index, True)
            lse = lse.masked_fill(~is_asked[..., None], float("inf"))
        else:
            queries, lse = [taken(x, q_index) for x in queries], taken(lse, q_index)
        own, own_weights, own_attention = queries
        total = index_loss(
            own, leaves[1], own_weights, own_attention, attention_k, lse, scale=0.4, size=size,
            q_index=q_index, **options,
        )  # fmt: skip
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_forms, "SCORES", chunk_elements)
        patch.setattr(loss_forms, "SCORES", chunk_elements)
        compare(select, [q, weights], [pooled], row.q_index)
        for ours, reference in zip(loss(row.q_index), loss(None), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
