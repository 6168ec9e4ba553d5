"""What DeepSpeed cannot do is refused before anything starts; only runs that ask for it import it."""

import sys
from pathlib import Path

import pytest

import parallel.config.zero_checks
from conf.errors import ConfigError, Violation
from parallel.config.zero import RELEASE
from tests.train.runs import overrides_of
from tests.worlds import run_world
from train.config.load import load_config
from train.estimate.memory import memory_per_rank

BASE = overrides_of(Path("dataset"), Path("tree"), Path("run"), "data.sequence_length=96")
ZERO = "parallel.data=zero"
# What is typed, on how many processes, the key that is refused, and what makes it right.
REFUSED = {
    "pp": (["parallel.pp=2", "train.micro_batch=1"], 4, "parallel.pp", "parallel.pp=1"),
    "copies": (["parallel.dp_replicate=2"], 4, "parallel.dp_replicate", "parallel.dp_replicate=1"),
    "cp": (["parallel.cp=2"], 2, "parallel.cp", "parallel.cp=1"),
    "tp": (["parallel.tp=2"], 2, "parallel.tp", "parallel.tp=1"),
    "ep": (["parallel.ep=2"], 2, "parallel.ep", "parallel.ep=1"),
    "float64": (["precision=fp64"], 2, "precision.parameters", "precision=bf16"),
    "activations": (["parallel.offload=activations"], 2, "parallel.offload", "parallel.offload=none"),
    "prefetch": (["parallel.prefetch=1"], 2, "parallel.prefetch", "parallel.prefetch=0"),
    "recomputing in stage 3": (
        ["parallel.recompute=full", "parallel.zero.stage=3"],
        2,
        "parallel.recompute",
        "parallel.recompute=none",
    ),
    "weights below stage 3": (
        ["parallel.zero.offload=parameters"],
        2,
        "parallel.zero.offload",
        "parallel.zero.stage=3",
    ),
}


def violations(typed: list[str], world_size: int | None) -> tuple[Violation, ...]:
    try:
        load_config([*BASE, *typed], world_size)
    except ConfigError as error:
        return error.violations
    return ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_deepspeed_cannot_do_is_refused_with_a_legal_value(name: str) -> None:
    typed, world_size, key, fix = REFUSED[name]
    assert key in [found.key for found in violations([ZERO, *typed], world_size)]
    assert violations([ZERO, *typed, fix], world_size) == ()


def test_a_run_says_who_cuts_its_data() -> None:
    def said(*typed: str) -> str:
        return load_config([*BASE, *typed], 2).parallel.describe(2)

    assert said() == "2 = dp_shard 2"
    assert said(ZERO, "parallel.zero.stage=1") == "2 = dp_shard 2; DeepSpeed ZeRO 1"
    away = (ZERO, "parallel.zero.stage=3", "parallel.zero.offload=parameters")
    assert said(*away) == "2 = dp_shard 2; DeepSpeed ZeRO 3, parameters in host memory"


def test_all_that_is_refused_comes_at_once() -> None:
    typed = ["parallel.tp=2", "precision=fp64", "parallel.zero.offload=parameters", "optim.lr=-1"]
    found = {one.key for one in violations([ZERO, *typed], 2)}
    assert found == {"parallel.tp", "precision.parameters", "parallel.zero.offload", "optim.lr"}


def test_offloading_without_zero_is_refused() -> None:
    (found,) = violations(["parallel.zero.offload=optimizer"], 2)
    assert found.key == "parallel.zero.offload"
    assert "parallel.data=zero" in found.message


@pytest.mark.parametrize("installed", ["none", "0.18.0"])
def test_another_release_or_none_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    def version(name: str) -> str:
        if installed == "none":
            raise parallel.config.zero_checks.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(parallel.config.zero_checks, "version", version)
    (found,) = violations([ZERO], 2)
    assert found.key == "parallel.data"
    assert f"found {installed}; pip install deepspeed=={RELEASE}" in found.message
    # A plan of another machine's run wants nothing here, and another data parallelism nothing at all.
    assert violations([ZERO], None) == violations([], 2) == ()


def modules(rank: int, size: int) -> bool:
    import train.loop.zero

    return "deepspeed" in sys.modules and train.loop.zero is not None


def test_only_runs_that_ask_for_it_import_it() -> None:
    assert run_world(1, modules, initialise=False) == [False]


def test_the_plan_counts_what_each_stage_cuts() -> None:
    def plan(*typed: str) -> list[int]:
        memory = memory_per_rank(load_config([*BASE, ZERO, *typed], 4), 4)
        return [memory.weights, memory.gradients, memory.optimizer, memory.host]

    # The whole in bytes, and the quarter of a rank. The model is smaller than a bucket.
    numbers = plan("parallel.zero.stage=1")[0]
    part = numbers // 4
    near = pytest.approx
    assert plan("parallel.zero.stage=1") == near([numbers, 2 * numbers, 3 * part, 0], rel=1e-3)
    assert plan("parallel.zero.stage=2") == near([numbers, numbers + part, 3 * part, 0], rel=1e-3)
    assert plan("parallel.zero.stage=3") == near([part, numbers + part, 3 * part, 0], rel=1e-3)
    away = ("parallel.zero.stage=3", "parallel.zero.offload=parameters")
    assert plan(*away) == near([0, numbers, 0, 5 * part], rel=1e-3)
