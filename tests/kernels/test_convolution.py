import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.convolution import short_convolution
from kernels.convolution.reference import convolution_direct
from kernels.convolution.shapes import SHAPES, Shape
from tests.closeness import assert_close, outputs_and_grads


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_silu", [False, True])
def test_equals_torch_conv1d(shape: Shape, has_bias: bool, has_silu: bool) -> None:
    sizes = [shape[:3], shape[2:4], shape[2:3]][: 2 + has_bias]
    inputs = [torch.randn(size, dtype=torch.float64) for size in sizes]

    def conv1d(x, weight, bias=None):
        padded = torch.nn.functional.pad(x.transpose(1, 2), (shape.taps - 1, 0))
        out = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=shape.channels)
        return (torch.nn.functional.silu(out) if has_silu else out).transpose(1, 2)

    ours = outputs_and_grads(lambda *x: short_convolution(*x, has_silu=has_silu), inputs)
    assert_close(ours, outputs_and_grads(conv1d, inputs), 1e-12)


@given(
    tokens=st.integers(1, 20),
    taps=st.integers(1, 6),
    starts=st.sampled_from([0.0, 0.2, 1.0]),
    has_bias=st.booleans(),
    has_silu=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_equals_the_direct_sum_with_documents(
    tokens: int, taps: int, starts: float, has_bias: bool, has_silu: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    sizes = [(2, tokens, 3), (3, taps), (3,)][: 2 + has_bias]
    inputs = [torch.randn(size, dtype=torch.float64) for size in sizes]
    options = {"document": (torch.rand(2, tokens) < starts).long().cumsum(1), "has_silu": has_silu}
    ours = outputs_and_grads(lambda *x: short_convolution(*x, **options), inputs)
    assert_close(ours, outputs_and_grads(lambda *x: convolution_direct(*x, **options), inputs), 1e-12)


def test_a_state_stands_for_the_tokens_before() -> None:
    x, weight = torch.randn(2, 12, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    document = torch.tensor([[0] * 7 + [1] * 5, [0] * 12])
    whole = short_convolution(x, weight, document=document)
    for cut in (3, 5, 7, 8):
        is_own = document[:, cut - 3 : cut] == document[:, cut : cut + 1]
        state = torch.where(is_own[..., None], x[:, cut - 3 : cut], 0.0)
        rest = short_convolution(x[:, cut:], weight, document=document[:, cut:], initial_state=state)
        assert torch.allclose(rest, whole[:, cut:], rtol=0, atol=1e-14)
