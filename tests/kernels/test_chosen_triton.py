"""The indexer and attention to what it chose, in Triton: ties, nothing chosen, far scores, and defects."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.block_selection import triton as peaks
from kernels.indexer import triton as indexer
from kernels.indexer import triton_loss as index_losses
from kernels.indexer.reference import choose_directly
from kernels.indexer.shapes import Shape as IndexShape
from kernels.indexer.spec import draw_chosen, draw_full, draw_selection
from kernels.indexer.triton import index_select_triton
from kernels.selected_attention import triton as selected
from kernels.selected_attention.reference import selected_attention_direct
from kernels.selected_attention.shapes import Shape
from kernels.selected_attention.spec import draw
from kernels.selected_attention.triton import Tiles, selected_attention_triton
from kernels.spec import KernelCase, input_factory, kernel_specs, outputs_and_grads, relative_errors
from tests.closeness import assert_case, assert_kernel

pytestmark = pytest.mark.interpreted
LIMIT = 1e-5
SMALL = Tiles(16, 16, 1, 1)
INDEX_TILES = indexer.Tiles(16, 16, 64, 16, 1)


@settings(max_examples=6)
@given(
    tokens=st.integers(1, 7),
    groups=st.sampled_from([1, 2]),
    repeat=st.sampled_from([1, 3, 17]),
    chosen=st.integers(1, 20),
    flags=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**20),
)
def test_attention_to_any_selection(tokens, groups, repeat, chosen, flags, seed) -> None:
    is_shared, has_sinks = flags
    shape = Shape(1, tokens, groups * repeat, groups, 24, 16, chosen, None, is_shared, has_sinks)
    case = draw(shape, input_factory(torch.float32, seed=seed, uses_small_tiles=True))
    assert_kernel(case, LIMIT)


def case_of(selection: torch.Tensor, scale: float = 0.3, sinks: torch.Tensor | None = None) -> KernelCase:
    shape = (*selection.shape[:2], 4, 16)
    inputs = {"q": torch.randn(shape), "k": torch.randn(1, 12, 2, 16), "v": torch.randn(1, 12, 2, 8)}
    if sinks is not None:
        inputs["sinks"] = sinks
    return KernelCase(
        inputs,
        lambda **x: selected_attention_triton(**x, selection=selection, scale=scale, tiles=SMALL)[:1],
        lambda **x: selected_attention_direct(**x, selection=selection, scale=scale)[:1],
    )


def test_nothing_chosen_is_zero_and_unseen_keys_get_no_gradient() -> None:
    selection = torch.full((1, 3, 20), -1)
    selection[0, 1, 17] = 5
    found = outputs_and_grads(case_of(selection).triton, case_of(selection).inputs)
    assert torch.equal(found["out0"][0, [0, 2]], torch.zeros(2, 4, 8))
    for name in ("grad k", "grad v"):
        unseen = [key for key in range(12) if key != 5]
        assert torch.equal(found[name][:, unseen], torch.zeros_like(found[name][:, unseen]))
        assert found[name][:, 5].abs().sum() > 0
    assert_kernel(case_of(selection), LIMIT)


@pytest.mark.parametrize("scale", [1e-3, 3.0])
@pytest.mark.parametrize("sink", [-1e4, 0.0, 60.0, float("-inf")])
def test_far_scores_and_sinks(scale: float, sink: float) -> None:
    selection = torch.rand(1, 3, 12).argsort(-1)[..., :7]
    assert_case(case_of(selection, scale, torch.full((4,), sink)))


def count_without_the_last(selection, query, chosen, CHOSEN: tl.constexpr):
    slot = tl.arange(0, CHOSEN)
    key = tl.load(selection + query * chosen + slot, mask=slot < chosen, other=-1)
    return tl.max(tl.where(key >= 0, slot + 1, 0), axis=0) // 16 * 16


def rows_of_the_first_part(x, base, key, is_key, first, dim, stride, DIM: tl.constexpr):
    column = tl.arange(0, DIM)
    offs = base + key[:, None] * stride + column[None, :]
    return tl.load(x + offs, mask=is_key[:, None] & (column < dim)[None, :], other=0.0)


def everything_is_visible(
    last, entry_document, document, q_index, row, query, entry, tokens, entries,
    HAS_DOCUMENTS: tl.constexpr, HAS_Q_INDEX: tl.constexpr,
):  # fmt: skip
    return (query < tokens)[:, None] & (entry < entries)[None, :]


def the_later_of_equals(best_score, best_key, scores, key, is_in):
    scores = tl.where(is_in, scores, float("-inf"))
    tile_score = tl.max(scores, axis=1)
    tile_key = tl.max(tl.where(scores == tile_score[:, None], key[None, :], -1), axis=1)
    return tl.where(tile_score > best_score, tile_score, best_score), tl.where(
        tile_score > best_score, tile_key, best_key
    )


def shares_of_their_neighbours(
    k, entries, shares, query, row, start, count, dim, k_row, k_token,
    ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    slot = start + tl.arange(0, ENTRIES)
    entry = tl.load(entries + query * count + slot, mask=slot < count, other=-1).to(tl.int32)
    is_entry = entry >= 0
    other = (slot + 1) % count
    share = tl.load(shares + query * count + other, mask=is_entry, other=0.0).to(tl.float32)
    column = tl.arange(0, DIM)
    k_ptrs = k + row * k_row + entry[:, None] * k_token + column[None, :]
    keys = tl.load(k_ptrs, mask=is_entry[:, None] & (column < dim)[None, :], other=0.0)
    return keys, share, entry, slot, is_entry


DEFECTS = [
    (selected, "selected_count", count_without_the_last, "selected_attention.dsa", 2),
    (selected, "selected_rows", rows_of_the_first_part, "selected_attention.dsa", 3),
    (indexer, "index_visible", everything_is_visible, "indexer.selection", 1),
    (indexer, "index_visible", everything_is_visible, "indexer.full", 1),
    (index_losses, "index_chosen_tile", shares_of_their_neighbours, "indexer.chosen", 1),
    (peaks, "selection_better", the_later_of_equals, "block_selection.max", 1),
]


@pytest.mark.parametrize(("module", "name", "defect", "spec", "shape_index"), DEFECTS)
def test_a_defect_in_a_kernel_is_seen(module, name, defect, spec, shape_index, monkeypatch) -> None:
    found = next(s for s in kernel_specs(spec.split(".")[0]) if s.name == spec)
    case = found.draw(found.shapes[shape_index], input_factory(torch.float32, uses_small_tiles=True))
    assert_kernel(case, LIMIT)
    monkeypatch.setattr(module, name, triton.jit(defect))
    assert not max(relative_errors(case).values()) <= 1e-3


@settings(max_examples=8)
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 3),
    top_k=st.integers(1, 30),
    pools=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_best_of_any_scores(tokens: int, heads: int, top_k: int, pools: bool, seed: int) -> None:
    drawn = input_factory(torch.float32, seed=seed, uses_small_tiles=True)
    shape = IndexShape(2, tokens, heads, 4, 2, 8, top_k, pools)
    assert max(relative_errors(draw_selection(shape, drawn)).values()) == 0.0
    assert_kernel(draw_full(shape, drawn), LIMIT)
    assert_kernel(draw_chosen(shape._replace(rows=1), drawn), LIMIT)


def test_equal_negative_infinite_and_zero_scores_go_by_index() -> None:
    # Scores of minus zero, zero and less than zero: the first indices win among equals.
    q, k = torch.ones(1, 40, 1, 4), torch.zeros(1, 40, 4)
    k[0, 30:] = 1.0
    for weight in (-1.0, 0.0, 1.0):
        weights = torch.full((1, 40, 1), weight)
        ours = index_select_triton(q, k, weights, top_k=5, tiles=INDEX_TILES)
        assert torch.equal(ours, choose_directly(q, k, weights, top_k=5))


def test_what_is_chosen_does_not_depend_on_later_tokens() -> None:
    q, k, weights = torch.randn(1, 24, 2, 8), torch.randn(1, 24, 8), torch.randn(1, 24, 2)
    before = index_select_triton(q, k, weights, top_k=6, tiles=INDEX_TILES)
    changed = [x.clone() for x in (q, k, weights)]
    for x in changed:
        x[:, 13:] += 1.0
    after = index_select_triton(*changed, top_k=6, tiles=INDEX_TILES)
    assert torch.equal(before[:, :13], after[:, :13])
