import pytest
import torch
from torch import Tensor

from kernels.compressed_attention import joint, joint_attention
from kernels.compressed_attention.joint import joint_attention_direct
from kernels.compressed_attention.shapes import JOINT_SHAPES, JointShape
from kernels.document_windows import document_windows
from kernels.indexer import index_select
from tests.closeness import assert_true, outputs_and_grads, with_grads
from tests.kernels.test_block_attention import positions_of

PRECISIONS = [torch.float64, torch.float32]


@pytest.fixture(autouse=True, params=[0, 32])
def gathering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes would never gather: with 0 they always do."""
    monkeypatch.setattr(joint, "GATHERING", request.param)


def index_of(case: JointShape, slots: int) -> list[Tensor]:
    shapes = [(case.rows, case.tokens, 3, 5), (case.rows, slots, 5), (case.rows, case.tokens, 3)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("case", JOINT_SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.1])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("chunk_elements", [800, 1 << 30])
def test_chunks_equal_one_query_at_a_time(
    case: JointShape, starts, dtype, chunk_elements, monkeypatch
) -> None:
    monkeypatch.setattr("kernels.compressed_attention.joint.CHUNK_ELEMENTS", chunk_elements)
    position = positions_of(case.rows, case.tokens, starts)
    windows = document_windows(position, case.length, case.length)
    slots, selected = windows.start.shape[1], None
    if case.chosen is not None:
        index = index_of(case, slots)
        document = (position == 0).long().cumsum(1)
        selected = index_select(*index, top_k=case.chosen, last=windows.last, document=document)
    shapes = [(case.rows, case.tokens, case.heads, case.dim), (case.rows, case.tokens, case.dim)]
    shapes += [(case.rows, slots, case.dim), (case.heads,)]
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    options = {"windows": windows, "position": position, "scale": 0.4, "window": case.window}
    ours = outputs_and_grads(lambda *x: joint_attention(*x, selected, **options)[0], inputs)

    def theirs(*x: Tensor) -> Tensor:
        return joint_attention_direct(*x, selected, **options)[0] + 0 * sum(y.sum() for y in x)

    assert_true(ours, with_grads(theirs), inputs, 1e-10)
    mass = joint_attention(*inputs, selected, **options)[1]
    assert_true([mass], lambda *x: [joint_attention_direct(*x, selected, **options)[1]], inputs, 1e-10)
