import pytest
import torch
from torch import Tensor

from kernels.compressed_attention import entry_attention, entry_importance, select_by_entries
from kernels.compressed_attention.entries import entry_attention_direct
from kernels.compressed_attention.shapes import SHAPES, Shape
from kernels.document_windows import document_windows
from tests.closeness import assert_true, outputs_and_grads, with_grads
from tests.kernels.test_block_attention import positions_of

PRECISIONS = [torch.float64, torch.float32]


def windows_of(case: Shape, position: Tensor) -> dict:
    return {
        "entries": document_windows(position, case.length, case.stride),
        "blocks": document_windows(position, case.block, case.block),
        "position": position,
        "scale": 0.4,
    }


def inputs_of(case: Shape, slots: int) -> list[Tensor]:
    q = torch.randn(case.rows, case.tokens, case.heads, case.key_dim, dtype=torch.float64)
    shape = (case.rows, slots, case.key_heads)
    return [q, *(torch.randn(*shape, dim, dtype=torch.float64) for dim in (case.key_dim, case.value_dim))]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.1])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("chunk_elements", [400, 1 << 30])
def test_entry_attention_equals_one_query_at_a_time(case, starts, dtype, chunk_elements, monkeypatch) -> None:
    monkeypatch.setattr("kernels.compressed_attention.entries.CHUNK_ELEMENTS", chunk_elements)
    options = windows_of(case, positions_of(case.rows, case.tokens, starts))
    choice = {"count": case.chosen, "initial": 1, "local": 1}
    inputs = [x.to(dtype) for x in inputs_of(case, options["entries"].start.shape[1])]
    ours = outputs_and_grads(lambda *x: entry_attention(*x, **options, **choice)[0], inputs)

    def theirs(*x: Tensor) -> Tensor:
        return entry_attention_direct(*x, **options, choice=choice)[0] + 0 * sum(y.sum() for y in x)

    assert_true(ours, with_grads(theirs), inputs, 1e-10)
    if dtype == torch.float64:
        expected = entry_attention_direct(*inputs, **options, choice=choice)[1].sort(-1).values
        for slots in (
            entry_attention(*inputs, **options, **choice)[1],
            select_by_entries(*inputs[:2], **options, **choice),
        ):
            assert torch.equal(slots.sort(-1).values, expected)


def test_importance_adds_up_over_heads_to_what_blocks_are_chosen_by() -> None:
    case = SHAPES[2]
    options = windows_of(case, positions_of(case.rows, case.tokens, 0.0))
    q, k, v = inputs_of(case, options["entries"].start.shape[1])
    heads = q.unflatten(2, (case.key_heads, -1)).unbind(3)
    total = sum(entry_importance(head, k, **options) for head in heads)
    # The same float64 numbers of order one and less, added in another order.
    torch.testing.assert_close(total, entry_importance(q, k, **options), rtol=1e-13, atol=1e-14)
    choice = {"count": case.chosen, "initial": 0, "local": 0}
    chosen = options["blocks"].choose(total, options["position"], **choice)
    expected = entry_attention_direct(q, k, v, **options, choice=choice)[1]
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", {"k": torch.zeros(1, 3, 2, 5)}),
        ("v", {"v": torch.zeros(1, 2, 2, 4)}),
        ("position", {"position": torch.zeros(1, 7, dtype=torch.long)}),
        ("blocks", {"blocks": document_windows(torch.arange(8)[None], 3, 3)}),
    ],
)
def test_wrong_arguments_are_named(name: str, change: dict) -> None:
    position = torch.arange(8)[None]
    arguments = {
        "q": torch.zeros(1, 8, 4, 4),
        "k": torch.zeros(1, 3, 2, 4),
        "v": torch.zeros(1, 3, 2, 4),
        "entries": document_windows(position, 4, 2),
        "blocks": document_windows(position, 4, 4),
        "position": position,
    }
    with pytest.raises(Exception, match=name):
        entry_attention(**{**arguments, **change}, scale=1.0, count=1, initial=0, local=0)
