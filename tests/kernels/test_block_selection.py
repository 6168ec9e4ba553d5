import pytest
import torch
from torch import Tensor

from kernels.block_selection import select_by_max, select_by_mean
from kernels.block_selection.reference import select_by_max_direct, select_by_mean_direct
from kernels.block_selection.shapes import SHAPES, Shape
from tests.kernels.test_block_attention import positions_of


def inputs_of(case: Shape, key_heads: int) -> list[Tensor]:
    shapes = ((case.heads, case.dim), (key_heads, case.dim))
    return [torch.randn(case.rows, case.tokens, *shape, dtype=torch.float64) for shape in shapes]


@pytest.fixture(params=[1, 1 << 30])
def chunk_elements(request, monkeypatch) -> None:
    monkeypatch.setattr("kernels.block_selection.reference.CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunk_elements")
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.05, 0.5])
def test_by_mean_equals_one_query_at_a_time(case: Shape, starts: float) -> None:
    q, k = inputs_of(case, case.key_heads)
    options = {
        "block": case.block,
        "count": case.chosen,
        "position": positions_of(case.rows, case.tokens, starts),
    }
    assert torch.equal(select_by_mean(q, k, **options), select_by_mean_direct(q, k, **options))


@pytest.mark.usefixtures("chunk_elements")
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.05, 0.5])
def test_by_max_equals_one_query_at_a_time(case: Shape, starts: float) -> None:
    q, k = inputs_of(case, 1)
    options = {"block": case.block, "count": case.chosen, "local": case.local}
    options["position"] = positions_of(case.rows, case.tokens, starts)
    (slots, best_keys), (slow_slots, slow_best_keys) = (
        form(q, k, **options) for form in (select_by_max, select_by_max_direct)
    )
    assert torch.equal(best_keys[..., 0], slow_best_keys[..., 0])
    # Blocks that go first have one rank: their order is of no account.
    order, slow_order = slots.argsort(-1), slow_slots.argsort(-1)
    assert torch.equal(slots.gather(-1, order), slow_slots.gather(-1, slow_order))
    ours, theirs = best_keys[..., 1:].gather(-1, order), slow_best_keys[..., 1:].gather(-1, slow_order)
    is_chosen = slots.gather(-1, order) >= 0
    assert torch.equal(ours[is_chosen], theirs[is_chosen])


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_a_later_token_changes_no_selection(value: float) -> None:
    q, k = inputs_of(SHAPES[3], 1)
    options = {"block": 8, "count": 5, "position": positions_of(1, 130, 0.01)}
    changed = k.clone()
    changed[:, 70] = value
    assert torch.equal(select_by_mean(q, k, **options)[:, :70], select_by_mean(q, changed, **options)[:, :70])
    (slots, best_keys), (other_slots, other_best_keys) = (
        select_by_max(q, x, local=1, **options) for x in (k, changed)
    )
    assert torch.equal(slots[:, :70], other_slots[:, :70])
    assert torch.equal(best_keys[:, :70, :, 0], other_best_keys[:, :70, :, 0])
