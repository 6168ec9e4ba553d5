import pytest
import torch
from torch import Tensor

from kernels.compress import gated_compress, mean_compress, mlp_compress
from kernels.compress.reference import gated_compress_direct, mlp_compress_direct
from kernels.compress.shapes import SHAPES, Shape
from kernels.document_windows import Windows, document_windows
from tests.closeness import assert_true, outputs_and_grads, with_grads
from tests.kernels.test_block_attention import positions_of

PRECISIONS = [torch.float64, torch.float32]


def only_filled(out: Tensor, windows: Windows) -> Tensor:
    return out[windows.is_filled]


def compare(fast, direct, inputs: list[Tensor], windows: Windows) -> None:
    ours = outputs_and_grads(lambda *x: only_filled(fast(*x), windows), inputs)
    # Without any window the direct form's result depends on nothing.
    theirs = lambda *x: only_filled(direct(*x), windows) + 0 * sum(y.sum() for y in x)  # noqa: E731
    assert_true(ours, with_grads(theirs), inputs, 1e-10)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_perceptron_equals_window_by_window(case: Shape, starts: float, dtype) -> None:
    windows = document_windows(positions_of(case.rows, case.tokens, starts), case.length, case.stride)
    heads, dim, size = case.heads, case.dim, case.length * case.dim
    shapes = [
        (case.rows, case.tokens, heads, dim),
        (heads, case.length, dim),
        (heads, 7, size),
        (heads, dim, 7),
    ]
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    compare(
        lambda *x: mlp_compress(*x, windows),
        lambda *x: mlp_compress_direct(*x, windows),
        inputs,
        windows,
    )


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("is_overlapping", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_gated_equals_window_by_window(case: Shape, starts, is_overlapping, dtype) -> None:
    position = positions_of(case.rows, case.tokens, starts)
    windows = document_windows(position, case.length, case.length)
    shape = (case.rows, case.tokens, 2 * case.dim)
    inputs = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    inputs.append(torch.randn(case.length, 2 * case.dim, dtype=dtype))
    # Large gates saturate: their gradients are next to nothing, and in float32 mostly rounding. The other
    # channels' gates have gradients to compare.
    inputs[1][..., ::2] *= 30
    options = {"windows": windows, "position": position, "is_overlapping": is_overlapping}
    compare(
        lambda *x: gated_compress(*x, **options),
        lambda *x: gated_compress_direct(*x, **options),
        inputs,
        windows,
    )


def test_mean_is_that_of_the_window() -> None:
    x = torch.arange(14.0)[None, :, None, None]
    position = torch.cat([torch.arange(5), torch.arange(9)])[None]
    windows = document_windows(position, 4, 2)
    means = mean_compress(x, windows)[windows.is_filled].flatten().tolist()
    assert means == [1.5, 6.5, 8.5, 10.5]


@pytest.mark.parametrize(
    ("name", "change"),
    [("gates", {"gates": torch.zeros(1, 8, 3)}), ("bias", {"bias": torch.zeros(3, 4)})],
)
def test_wrong_arguments_are_named(name: str, change: dict) -> None:
    position = torch.arange(8)[None]
    arguments = {"values": torch.zeros(1, 8, 4), "gates": torch.zeros(1, 8, 4), "bias": torch.zeros(2, 4)}
    with pytest.raises(Exception, match=name):
        gated_compress(
            **{**arguments, **change},
            windows=document_windows(position, 2, 2),
            position=position,
            is_overlapping=True,
        )
