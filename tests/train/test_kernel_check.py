import pytest
import torch

from conf.errors import NumericsError
from kernels.choose import FAMILIES, describe, set_backends, takes_triton, use_backends
from kernels.verdict import Verdict
from model.language_model import LanguageModel
from parallel.mesh.world import World
from tests.architectures import small_architecture
from train.config.fields import KernelsConfig
from train.config.load import load_config
from train.loop import kernel_check


@pytest.fixture(autouse=True)
def _own_choice():
    with use_backends({}):
        yield


def test_the_config_has_every_family() -> None:
    assert set(KernelsConfig.model_fields) == {*FAMILIES, "check"}
    assert set(load_config(["kernels=reference"], 1).kernels.backends().values()) == {"reference"}


def test_plain_torch_on_a_cpu_and_an_error_where_triton_is_asked_for() -> None:
    x = torch.ones(1)
    assert not takes_triton("norm", x)
    assert describe(torch.device("cpu"), torch.float32) == "kernels on cpu in float32: plain torch: all"
    with use_backends({"norm": "triton"}), pytest.raises(ValueError, match=r"kernels\.norm: .*needs a GPU"):
        takes_triton("norm", x)
    with pytest.raises(ValueError, match=r"kernels\.nrm: no such family"):
        set_backends({"nrm": "auto"})


def test_a_model_names_the_families_that_it_uses() -> None:
    used = kernel_check.used_families(LanguageModel(small_architecture(["model=qwen3_next_small"])).modules())
    assert {"delta_rule", "attention", "convolution", "experts", "norm", "cross_entropy"} <= set(used)
    assert not {"indexer", "block_attention", "selective_scan"} & set(used)


def test_a_wrong_kernel_stops_the_run_or_is_left_out(capsys) -> None:
    world, families = World.alone(torch.device("cpu")), ["attention", "norm"]
    verdict = Verdict("attention.window", torch.bfloat16, "grad q", 0.3, 0.01)
    assert kernel_check.wrong_anywhere([], families, world) == []
    wrong = kernel_check.wrong_anywhere([verdict], families, world)
    assert wrong == ["attention"]
    assert "attention.window is WRONG on this GPU: grad q is off by 3.0e-01" in capsys.readouterr().err
    config = load_config([], 1).kernels
    with pytest.raises(NumericsError, match=r"leave them out by kernels\.attention=reference"):
        kernel_check.backends_after_check(config, wrong)
    assert set(kernel_check.backends_after_check(config, []).values()) == {"auto"}
    backends = kernel_check.backends_after_check(load_config(["kernels.check=fall_back"], 1).kernels, wrong)
    assert [name for name, backend in backends.items() if backend == "reference"] == ["attention"]


def test_a_verdict_that_is_no_number_is_wrong() -> None:
    assert not Verdict("norm", torch.bfloat16, "out0", float("nan"), 0.01).is_right
