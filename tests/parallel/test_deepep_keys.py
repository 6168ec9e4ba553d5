"""What DeepEP cannot move is refused before the start; only runs that ask for it import Megatron-Core."""

import sys
from pathlib import Path

import pytest
import torch

import parallel.config.deepep
from conf.errors import ConfigError, Violation
from parallel.config.deepep import RELEASE
from tests.train.runs import overrides_of
from tests.worlds import process_pool, run_world
from train.config.load import load_config
from train.rehearse import rehearse

BASE = (
    *overrides_of(Path("dataset"), Path("tree"), Path("run")),
    "layout.pattern=lightning",
    "precision=bf16",
    "model.width=256",
    "moe.num_experts=288",
    "train.global_batch=1152",
    "parallel.ep_dispatch=deepep",
)
# What is typed, the key that is refused, what the message must end with, and what makes it right.
REFUSED = {
    "one rank": ([8, "parallel.ep=1"], "parallel.ep", "legal values are 4, 8, or set", "parallel.ep=4"),
    "no kernel": ([24, "parallel.ep=24"], "parallel.ep", "legal values are 4, 8, or set", "parallel.ep=8"),
    "many experts": (
        [2, "parallel.ep=2"],
        "parallel.ep",
        "found 2 with 144 experts each; set",
        "parallel.ep_dispatch=all_to_all",
    ),
    "many experts on many nodes": (
        [16, "parallel.ep=16", "moe.num_experts=2048"],
        "parallel.ep",
        "found 16 with 128 experts each; set",
        "moe.num_experts=1024",
    ),
    "width on a node": (
        [8, "parallel.ep=8", "model.width=40"],
        "model.width",
        "use 32 or 48, or",
        "model.width=48",
    ),
    "width on nodes": (
        [16, "parallel.ep=16", "model.width=272"],
        "model.width",
        "use 256 or 512, or",
        "model.width=512",
    ),
    "large width": (
        [8, "parallel.ep=8", "model.width=8192"],
        "model.width",
        "use 8176, or",
        "model.width=8176",
    ),
    "choices": ([8, "parallel.ep=8", "moe.top_k=33"], "moe.top_k", "lower it to 32, or", "moe.top_k=32"),
    "choices on many nodes": (
        [144, "parallel.ep=144", "moe.top_k=10"],
        "moe.top_k",
        "lower it to 8, or",
        "moe.top_k=8",
    ),
    "float32": (
        [8, "parallel.ep=8", "precision=fp32"],
        "precision.compute",
        "found float32; set",
        "precision=bf16",
    ),
}


def violations(size: int, typed: list[str], *, starts: bool = False) -> tuple[Violation, ...]:
    """Of a run on a cluster of so many GPUs, or of its start on this machine."""
    try:
        load_config([*BASE, f"cluster.gpus_per_node={size}", *typed], size if starts else None)
    except ConfigError as error:
        return error.violations
    return ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_deepep_cannot_move_is_refused_with_a_legal_value(name: str) -> None:
    (size, *typed), key, says, fix = REFUSED[name]
    (found,) = violations(int(size), [str(one) for one in typed])
    assert found.key == key
    assert says in found.message
    assert violations(int(size), [*(str(one) for one in typed), fix]) == ()
    other = [*(str(one) for one in typed), "parallel.ep_dispatch=all_to_all"]
    assert violations(int(size), other) == ()


def test_all_that_is_refused_comes_at_once() -> None:
    typed = ["parallel.ep=1", "model.width=40", "moe.top_k=33", "precision=fp32"]
    keys = {found.key for found in violations(8, typed, starts=True)}
    parts = {"parallel.ep", "model.width", "moe.top_k", "precision.compute", "parallel.ep_dispatch"}
    assert keys == parts


@pytest.mark.parametrize("installed", ["none", "1.1.0", "2.1.0"])
def test_another_release_or_none_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    found = starting_with(installed, monkeypatch)
    assert [one.key for one in found] == ["parallel.ep_dispatch"]
    assert f"found {installed}; pip install" in found[0].message
    assert f"DeepEP@v{RELEASE}" in found[0].message


def test_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = starting_with(f"{RELEASE}+9af0e0d", monkeypatch, has_gpu=False)
    assert (found.key, found.message) == (
        "parallel.ep_dispatch",
        "deepep runs on GPUs; found none that torch can use; set all_to_all",
    )


def test_its_release_on_a_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert starting_with(f"{RELEASE}+9af0e0d", monkeypatch) == ()


def starting_with(
    installed: str, monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool = True
) -> tuple[Violation, ...]:
    def version(name: str) -> str:
        if installed == "none":
            raise parallel.config.deepep.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(parallel.config.deepep, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    return violations(8, ["parallel.ep=8"], starts=True)


def test_it_cannot_be_rehearsed() -> None:
    config = load_config([*BASE, "cluster.gpus_per_node=8", "parallel.ep=8"], None)
    with process_pool(1) as pool, pytest.raises(ConfigError) as caught:
        rehearse(config, pool)
    assert [found.key for found in caught.value.violations] == ["parallel.ep_dispatch"]


def modules(rank: int, size: int) -> list[str]:
    import parallel.shard.deepep
    import train.loop.run

    assert parallel.shard.deepep is not None
    assert train.loop.run is not None
    return [name for name in sys.modules if name.startswith(("megatron.", "deep_ep"))]


def test_only_runs_that_ask_for_it_import_it() -> None:
    assert run_world(1, modules, initialise=False) == [[]]
