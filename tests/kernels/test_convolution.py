import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.convolution import CASES, Case, short_convolution
from kernels.convolution.reference import convolution_direct
from tests.closeness import assert_close, outputs_and_grads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch_conv1d(case: Case) -> None:
    x, weight = torch.randn(case[:3], dtype=torch.float64), torch.randn(case[2:], dtype=torch.float64)

    def conv1d(x, weight):
        padded = torch.nn.functional.pad(x.transpose(1, 2), (case.taps - 1, 0))
        out = torch.nn.functional.conv1d(padded, weight[:, None], groups=case.channels)
        return torch.nn.functional.silu(out).transpose(1, 2)

    assert_close(
        outputs_and_grads(short_convolution, [x, weight]), outputs_and_grads(conv1d, [x, weight]), 1e-12
    )


@given(
    tokens=st.integers(1, 20),
    taps=st.integers(1, 6),
    starts=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_equals_the_direct_sum_with_documents(tokens: int, taps: int, starts: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(2, tokens, 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    document = (torch.rand(2, tokens) < starts).long().cumsum(1)
    ours = outputs_and_grads(lambda *a: short_convolution(*a, document=document), [x, weight])
    direct = outputs_and_grads(lambda *a: convolution_direct(*a, document=document), [x, weight])
    assert_close(ours, direct, 1e-12)
