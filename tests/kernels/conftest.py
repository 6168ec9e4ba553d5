"""Kernels in Triton's interpreter, with right bfloat16 numbers and memory that is NaN until written."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    # Only now: what the shapes hook checks must not be imported before it.
    from kernels.choose import is_interpreted

    assert is_interpreted(), "tests marked interpreted need TRITON_INTERPRET=1; `make prove` sets it"
    # Deterministic algorithms fill new memory with NaN, so that a number never written is seen.
    assert torch.empty(1).isnan().all()
    from kernels.interpreter import corrected

    with corrected():
        yield
