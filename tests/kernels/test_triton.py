"""Every Triton kernel in the interpreter against the float64 truth: outputs and all gradients."""

import pytest
import torch

from kernels.trial import Subject, deviations, setting, subjects

pytestmark = [pytest.mark.interpreted]

CASES = [
    pytest.param(subject, case, id=f"{subject.name}-{place}")
    for subject in subjects()
    for place, case in enumerate(subject.cases)
]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("subject", "case"), CASES)
def test_kernel_is_the_truth(subject: Subject, case: object, dtype: torch.dtype) -> None:
    found = deviations(subject.draw(case, setting(dtype, is_small=True)))
    assert len(found) > 0
    assert max(found.values()) <= LIMITS[dtype], found
