"""Triton kernels whose queries are some tokens of a row: what they get among all, by float64 references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention_with_lse
from kernels.attention.reference import FULL, Pattern, attention_direct
from kernels.attention.spec import SMALL
from kernels.attention.triton import attention_triton
from kernels.block_attention.reference import block_attention_direct
from kernels.block_attention.spec import SMALL as BLOCK_TILES
from kernels.block_attention.triton import block_attention_triton
from kernels.block_selection.reference import select_by_max_chunked
from kernels.block_selection.triton import Tiles as SelectionTiles
from kernels.block_selection.triton import select_by_max_triton
from kernels.compressed_attention.entries import entry_attention_direct
from kernels.compressed_attention.joint import joint_attention_direct
from kernels.compressed_attention.triton import entry_attention_triton, joint_attention_triton
from kernels.compressed_attention.triton_selected import joint_selected_triton
from kernels.document_windows import document_windows
from kernels.indexer import pool_keys
from kernels.indexer.loss import index_loss_full
from kernels.indexer.reference import choose_directly
from kernels.indexer.triton import Tiles as IndexTiles
from kernels.indexer.triton import index_select_triton
from kernels.indexer.triton_loss import index_loss_full_triton
from kernels.query_index import at_queries
from kernels.spec import KernelCase, input_factory
from tests.closeness import assert_kernel

pytestmark = pytest.mark.interpreted

KEYS = 45
Q_INDEX = {
    # Two chunks, of which tiles hold parts of both; any tokens, in each row others; one.
    "chunks": torch.cat([torch.arange(3, 12), torch.arange(33, 42)]).expand(2, -1),
    "any": torch.stack([torch.arange(0, 45, 3), 15 + 2 * torch.arange(15)]),
    "one": torch.tensor([[0], [44]]),
}
EVERY_Q_INDEX = pytest.mark.parametrize("where", Q_INDEX)


def spread(x: Tensor, q_index: Tensor) -> Tensor:
    """[B T ...] among all tokens [B S ...], zeros elsewhere."""
    index = q_index.view(*q_index.shape, *[1] * (x.ndim - 2)).expand_as(x)
    return x.new_zeros(x.shape[0], KEYS, *x.shape[2:]).scatter(1, index, x)


def taken(x: Tensor, q_index: Tensor) -> Tensor:
    index = q_index.view(*q_index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


PATTERNS = (FULL, Pattern(7), Pattern(12, 4), Pattern(8, 4, 6))


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("where", ["chunks", "any"])
def test_attention(where: str, pattern: Pattern, has_documents: bool) -> None:
    draw, q_index = input_factory(torch.float32), Q_INDEX[where]
    document, position = draw.documents(2, KEYS, 20.0) if has_documents else (None, None)
    inputs = {"q": draw.normal(2, q_index.shape[1], 4, 16), "k": draw.normal(2, KEYS, 2, 16)}
    inputs |= {"v": draw.normal(2, KEYS, 2, 16), "sinks": draw.normal(4)}
    options: dict[str, Any] = {"scale": 0.3, "pattern": pattern, "document": document, "position": position}

    def reference(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        outs = attention_direct(spread(q, q_index), k, v, sinks=sinks, **options)
        return tuple(taken(out, q_index) for out in outs)

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        return attention_triton(q, k, v, sinks=sinks, q_index=q_index, tiles=SMALL, **options)

    assert_kernel(KernelCase(inputs, ours, reference))


@EVERY_Q_INDEX
def test_entry_attention(where: str) -> None:
    draw, q_index = input_factory(torch.float32), Q_INDEX[where]
    position = draw.documents(2, KEYS, 30.0)[1]
    entries, blocks = document_windows(position, 4, 2), document_windows(position, 4, 4)
    slots = entries.start.shape[1]
    inputs = {"q": draw.normal(2, q_index.shape[1], 4, 16)}
    inputs |= {"k": draw.normal(2, slots, 2, 16), "v": draw.normal(2, slots, 2, 16)}
    options: dict[str, Any] = {"entries": entries, "blocks": blocks, "position": position, "scale": 0.3}
    options["choice"] = {"count": 4, "initial": 1, "local": 1}

    def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, chosen = entry_attention_direct(spread(q, q_index), k, v, **options)
        return taken(out, q_index), taken(chosen, q_index).sort(-1).values

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, chosen = entry_attention_triton(q, k, v, q_index=q_index, **options, tiles=SMALL, chunk=300)
        # Blocks that go first are equals.
        return out, chosen.sort(-1).values

    assert_kernel(KernelCase(inputs, ours, reference))


@pytest.mark.parametrize("count", [None, 4])
@EVERY_Q_INDEX
def test_joint_attention(where: str, count: int | None) -> None:
    draw, q_index, before = input_factory(torch.float32), Q_INDEX[where], 3
    position = draw.documents(2, KEYS, 30.0)[1]
    windows = document_windows(position, 4, 4)
    slots = windows.start.shape[1]
    inputs = {"q": draw.normal(2, q_index.shape[1], 4, 16), "kv": draw.normal(2, KEYS, 16)}
    inputs |= {"entries": draw.normal(2, slots, 16), "sinks": draw.normal(4)}
    selected = None
    if count is not None:
        selected = windows.choose(draw.uniform(2, KEYS, 1, slots), position, count=count)[:, :, 0]
    options: dict[str, Any] = {"scale": 0.3, "window": 6}

    def reference(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        more = {"windows": windows, "position": position}
        outs = joint_attention_direct(spread(q, q_index), kv, entries, sinks, selected, **options, **more)
        return tuple(taken(out, q_index) for out in outs)

    def ours(q: Tensor, kv: Tensor, entries: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        # The raw keys lie further back in a row of their own.
        kv = torch.nn.functional.pad(kv, (0, 0, before, 0), value=9.0)
        own = {"position": at_queries(position, q_index), "q_index": q_index + before}
        if selected is None:
            own |= {"windows": windows, "token_index": q_index, "tiles": SMALL}
            return joint_attention_triton(q, kv, entries, sinks, **options, **own)
        chosen = taken(selected, q_index)
        return joint_selected_triton(q, kv, entries, sinks, chosen, **options, **own, is_deterministic=True)

    assert_kernel(KernelCase(inputs, ours, reference))


@pytest.mark.parametrize("size", [1, 3])
@EVERY_Q_INDEX
def test_indexer(where: str, size: int) -> None:
    draw, q_index = input_factory(torch.float32), Q_INDEX[where]
    document, position = draw.documents(2, KEYS, 30.0)
    count, last = q_index.shape[1], None
    if size > 1:
        zeros = torch.zeros(2, KEYS, 1)
        last = pool_keys(zeros, zeros, torch.zeros(size, 1), position)[1]
    entries = KEYS if last is None else last.shape[1]
    # Small whole numbers: scores are exact and often equal, so that ties count.
    whole = {"low": -2, "high": 3, "dtype": torch.float32}
    inputs = {"q": draw.integers(2, count, 2, 16, **whole), "k": draw.integers(2, entries, 16, **whole)}
    inputs["weights"] = draw.integers(2, count, 2, **whole)
    tiles = IndexTiles(16, 16, 32, 32, 1)
    options: dict[str, Any] = {"last": last, "document": document}

    def ours(q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor]:
        return (index_select_triton(q, k, weights, top_k=5, q_index=q_index, tiles=tiles, **options),)

    def reference(q: Tensor, k: Tensor, weights: Tensor) -> tuple[Tensor]:
        chosen = choose_directly(spread(q, q_index), k, spread(weights, q_index), top_k=5, **options)
        return (taken(chosen, q_index),)

    assert_kernel(KernelCase(inputs, ours, reference))
    q, k = draw.normal(2, KEYS, 4, 16).double(), draw.normal(2, KEYS, 2, 16).double()
    _, lse = attention_with_lse(q, k, k, scale=0.3, document=document)
    own_q, own_lse = (taken(x, q_index) for x in (q, lse))
    inputs = {"q": draw.normal(2, count, 2, 16), "k": draw.normal(2, entries, 16)}
    inputs["weights"] = draw.normal(2, count, 2)
    options |= {"scale": 0.3, "size": size}

    def loss(index_q: Tensor, index_k: Tensor, weights: Tensor) -> tuple[Tensor]:
        attended = (x.float() for x in (own_q, k, own_lse))
        return (
            index_loss_full_triton(
                index_q, index_k, weights, *attended, q_index=q_index, tiles=tiles, **options
            ),
        )

    def true_loss(index_q: Tensor, index_k: Tensor, weights: Tensor) -> tuple[Tensor]:
        # Queries that are not asked about weigh nothing.
        is_asked = torch.zeros(2, KEYS, dtype=torch.bool).scatter(1, q_index, True)
        sums = lse.masked_fill(~is_asked[..., None], float("inf"))
        spreads = spread(index_q, q_index), index_k, spread(weights, q_index)
        return (index_loss_full(*spreads, q, k, sums, **options),)

    names = list(inputs)
    assert_kernel(
        KernelCase(
            inputs,
            lambda **x: loss(*(x[name] for name in names)),
            lambda **x: true_loss(*(x[name] for name in names)),
        )
    )


@EVERY_Q_INDEX
def test_block_selection(where: str) -> None:
    draw, q_index = input_factory(torch.float32), Q_INDEX[where]
    position = draw.documents(2, KEYS, 30.0)[1]
    whole = {"low": -2, "high": 3, "dtype": torch.float32}
    inputs = {
        "q": draw.integers(2, q_index.shape[1], 4, 16, **whole),
        "k": draw.integers(2, KEYS, 1, 16, **whole),
    }
    options: dict[str, Any] = {"block": 4, "count": 5, "local": 1, "position": position}

    def known(chosen: Tensor, best_keys: Tensor) -> tuple[Tensor, ...]:
        # The best key of no block may be any token.
        return chosen, best_keys[..., :1], best_keys[..., 1:].masked_fill(chosen < 0, -1)

    def reference(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        chosen, best_keys = select_by_max_chunked(spread(q, q_index), k, **options)
        return known(taken(chosen, q_index), taken(best_keys, q_index))

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        tiles = SelectionTiles(16, 16, 32, 1)
        return known(*select_by_max_triton(q, k, q_index=q_index, tiles=tiles, **options))

    assert_kernel(KernelCase(inputs, ours, reference))


@pytest.mark.parametrize("selectors", [2, 4])
@EVERY_Q_INDEX
def test_block_attention(where: str, selectors: int) -> None:
    draw, q_index = input_factory(torch.float32), Q_INDEX[where]
    position = draw.documents(2, KEYS, 30.0)[1]
    inputs = {"q": draw.normal(2, q_index.shape[1], 4, 16)}
    inputs |= {"k": draw.normal(2, KEYS, 2, 16), "v": draw.normal(2, KEYS, 2, 16)}
    windows = document_windows(position, 4, 4)
    scores = draw.uniform(2, KEYS, selectors, windows.start.shape[1])
    selected = windows.choose(scores, position, count=3)
    options: dict[str, Any] = {"scale": 0.3, "block": 4, "position": position}

    def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        outs = block_attention_direct(spread(q, q_index), k, v, selected, **options)
        return tuple(taken(out, q_index) for out in outs)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        own = taken(selected, q_index)
        return block_attention_triton(q, k, v, own, q_index=q_index, tiles=BLOCK_TILES, **options)

    assert_kernel(KernelCase(inputs, ours, reference))
