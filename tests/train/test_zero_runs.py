"""Whole runs that DeepSpeed trains, as users start them: asked to stop, gone on, handed to FSDP2 and back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import STOPPED
from tests.parallel.true_commands import TrueCommand, true_commands
from tests.train.conftest import Corpus
from tests.train.runs import log_path, metrics_of, run_to_end

SECONDS = 240
STEPS = 12  # checkpoints at 4, 8 and 12
pytestmark = [pytest.mark.prove, pytest.mark.xdist_group("zero runs"), pytest.mark.timeout(4 * SECONDS)]
KEYS = (
    *(f"train.steps={STEPS}", "train.evaluate_every=3", "checkpoint.keep=9", "residual.dropout=0.0"),
    # Small steps from weights near one: rounding of sums in another order stays rounding.
    *("optim.lr=0.001", "optim.clip_norm=0.5", "optim.lr_scales={blocks.0.mixer.*:0.0}"),
)
ZERO = ("parallel.data=zero", "parallel.zero.whole_below=100")


def torchrun(overrides: list[str]) -> subprocess.Popen[bytes]:
    """Two processes as users start them, in a session of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log_path(overrides).open("ab") as log:
        return subprocess.Popen(
            [*command, "-m", "train", *overrides],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def finished(overrides: list[str]) -> int:
    """Exit code of torchrun."""
    process = torchrun(overrides)
    try:
        return process.wait(SECONDS)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Leaves nothing of a launch behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def evaluations_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl."""
    return [json.loads(line) for line in (directory / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def true(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> TrueCommand:
    """What all runs round."""

    def overrides(directory: Path, *more: str) -> list[str]:
        return corpus.overrides(directory, *KEYS, *more)

    (found,) = true_commands(tmp_path_factory.mktemp("true"), overrides, [torch.float32])
    return found


@pytest.fixture(scope="module")
def keys(true: TrueCommand) -> tuple[str, ...]:
    """What all runs share: weights that they begin from."""
    return (*KEYS, true.start)


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus, keys: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("zero") / "run"
    overrides = corpus.overrides(directory, *keys, *ZERO, "parallel.zero.stage=3")
    assert finished(overrides) == 0, log_path(overrides).read_text()
    return directory


def test_a_run_by_torchrun_is_asked_to_stop_and_goes_on(
    corpus: Corpus, keys: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, *keys, *ZERO, "parallel.zero.stage=3")
    process, deadline = torchrun(overrides), time.monotonic() + SECONDS
    try:
        while not (directory / "metrics.jsonl").exists():
            assert process.poll() is None, log_path(overrides).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        (directory / "PREEMPT").touch()
        # torchrun has a code of its own, and prints that of the rank.
        assert process.wait(SECONDS) == 1, log_path(overrides).read_text()
        assert f"exitcode  : {STOPPED} " in log_path(overrides).read_text()
    finally:
        end(process)
    assert (directory / "REQUEUE").exists()
    assert 0 < len(metrics_of(directory)) < STEPS
    assert finished(overrides) == 0, log_path(overrides).read_text()
    said = log_path(overrides).read_text()
    assert said.count("began from ") == said.count("resume step ") == 1
    assert metrics_of(directory) == metrics_of(uninterrupted)
    assert evaluations_of(directory) == evaluations_of(uninterrupted)


def test_runs_of_zero_and_fsdp_are_the_same_and_take_each_other_on(
    corpus: Corpus, keys: tuple[str, ...], true: TrueCommand, uninterrupted: Path, tmp_path: Path
) -> None:
    fsdp = corpus.overrides(tmp_path / "fsdp", *keys)
    assert run_to_end(fsdp, 2, timeout=SECONDS) == 0, log_path(fsdp).read_text()
    true.check(uninterrupted, "zero")
    true.check(tmp_path / "fsdp", "fsdp")
    for source, name, parallel in (
        (uninterrupted, "zero to fsdp", ()),
        (tmp_path / "fsdp", "fsdp to zero", (*ZERO, "parallel.zero.stage=2")),
    ):
        # In the directory of the run itself, where a start from the save at step 4 is the same run.
        directory = tmp_path / name
        shutil.copytree(source, directory)
        for step in (8, STEPS):
            shutil.rmtree(directory / "checkpoints" / f"step_{step:08d}")
        overrides = corpus.overrides(directory, *keys, *parallel, "checkpoint.accept_step=4")
        assert run_to_end(overrides, 2, timeout=SECONDS) == 0, log_path(overrides).read_text()
        assert "resume step 4/" in log_path(overrides).read_text()
        assert metrics_of(directory)[:4] == metrics_of(source)[:4]
        assert metrics_of(directory)[4:] != metrics_of(source)[4:], "nothing was trained"
        true.check(directory, name)
