"""Every mixer with all of its kernels in Triton, beside the same mixer in plain torch and float64."""

import pytest
import torch

from conf.compose import group_options
from kernels.choose import FAMILIES, use_backends
from tests.architectures import small_architecture
from tests.closeness import relative
from tests.contracts.test_mixers import DEPTH, WIDTH, build, objective, packed, run

pytestmark = pytest.mark.interpreted
ENTRIES = group_options("mixer")
LIMIT = 1e-4


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_mixer_in_triton_is_the_mixer_in_float64(entry: str) -> None:
    config = small_architecture().mixer[entry]
    exact = build(config)
    ours = config.build(WIDTH, 1, DEPTH, 0.02)
    ours.load_state_dict(exact.state_dict())
    x, sequence = torch.randn(1, 37, WIDTH), packed(1, 37)
    found = []
    for mixer, backends in ((ours, dict.fromkeys(FAMILIES, "triton")), (exact, {})):
        leaf = x.detach().clone().to(next(mixer.parameters()).dtype).requires_grad_()
        with use_backends(backends):
            mixed = run(mixer, leaf, sequence)
            weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(leaf.dtype)
            objective(mixed, weight).backward()
        grads = {name: parameter.grad for name, parameter in mixer.named_parameters()}
        found.append({"out": mixed.out.detach(), "x": leaf.grad, **grads})
    for name, true in found[1].items():
        assert true is not None, name
        assert found[0][name] is not None, name
        assert relative(found[0][name], true) <= LIMIT, name
