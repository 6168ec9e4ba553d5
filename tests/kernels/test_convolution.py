from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from kernels.convolution import short_convolution
from kernels.convolution.reference import convolution_direct
from kernels.convolution.shapes import SHAPES, Shape
from tests.closeness import assert_close, outputs_and_grads, relative


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


# A chunk of six tokens behind a state of three; documents that start where the taps still reach the state.
STARTS = ((), (1,), (2,), (3,), (1, 2), (2, 3))
DOCUMENTS = [[sum(start <= t for start in row) for t in range(6)] for row in STARTS]


def by_token(document: Sequence[Sequence[int]], *inputs: Tensor) -> tuple[Tensor]:
    """Each output from the products that its document gives; the state is of the document of token 0."""
    x, weight, bias, state = inputs
    taps, rows = weight.shape[1], []
    for row, documents in enumerate(document):
        out = []
        for t, own in enumerate(documents):
            total = bias
            for shift in range(taps):
                source = t - shift
                if source >= 0 and documents[source] == own:
                    total = total + weight[:, taps - 1 - shift] * x[row, source]
                elif source < 0 and documents[0] == own:
                    total = total + weight[:, taps - 1 - shift] * state[row, taps - 1 + source]
            out.append(silu(total))
        rows.append(torch.stack(out))
    return (torch.stack(rows),)


def chunk_behind_a_state() -> list[Tensor]:
    sizes = ((len(DOCUMENTS), 6, 3), (3, 4), (3,), (len(DOCUMENTS), 3, 3))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def test_a_state_stops_where_a_document_starts() -> None:
    inputs, document = chunk_behind_a_state(), torch.tensor(DOCUMENTS)
    ours = outputs_and_grads(
        lambda x, w, b, s: short_convolution(x, w, b, document=document, initial_state=s), inputs
    )
    assert_close(ours, outputs_and_grads(lambda *x: by_token(DOCUMENTS, *x), inputs), 1e-12)


@pytest.mark.interpreted
def test_a_state_stops_where_a_document_starts_in_triton() -> None:
    from kernels.convolution.triton import Tiles, short_convolution_triton

    inputs, document = chunk_behind_a_state(), torch.tensor(DOCUMENTS)
    expected = outputs_and_grads(lambda *x: by_token(DOCUMENTS, *x), inputs)
    ours = outputs_and_grads(
        lambda x, w, b, s: short_convolution_triton(
            x, w, b, document=document, initial_state=s, tiles=Tiles(4, 4, 1)
        ),
        [x.float() for x in inputs],
    )
    for name, found, exact in zip(("y", "x", "weight", "bias", "state"), ours, expected, strict=True):
        # Row by row: one that the state leaks into is a small part of all.
        parts = zip(found, exact, strict=True) if found.ndim == 3 else ((found, exact),)
        assert all(relative(part, other) < 1e-5 for part, other in parts), name
