"""A run that is killed, again and again, is the run that never was."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from conf.errors import STOPPED
from tests.train.conftest import Corpus
from tests.train.runs import log_path, metrics_of, run_to_end, spawn_ranks, wait_for_metrics

STEPS = "train.steps=24"
KILLS = 20


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    directory = tmp_path_factory.mktemp("whole") / "run"
    start = time.monotonic()
    assert run_to_end(corpus.overrides(directory, STEPS, "train.final_rows=null")) == 0
    return directory, time.monotonic() - start


def test_a_finished_run_has_its_files(uninterrupted: tuple[Path, float]) -> None:
    directory, _ = uninterrupted
    lines = metrics_of(directory)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert {"loss", "grad_norm", "lr", "tokens"} <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    for name in ("result.json", "loss.png", "config.json", "evaluations.jsonl"):
        assert (directory / name).stat().st_size > 0
    assert "gzip -9 bits per byte" in json.loads((directory / "result.json").read_text())
    assert (directory / "checkpoints" / "step_00000024" / "manifest.json").exists()


@pytest.mark.prove
def test_twenty_kills_leave_no_trace(
    uninterrupted: tuple[Path, float], corpus: Corpus, tmp_path: Path
) -> None:
    whole, seconds = uninterrupted
    draw = random.Random(0)
    kills = inside_saves = runs = 0
    while kills < KILLS:
        directory = tmp_path / f"run_{runs}"
        overrides = corpus.overrides(directory, STEPS)
        while not (directory / "result.json").exists():
            (process,) = spawn_ranks(overrides, 1)
            deadline = time.monotonic() + draw.uniform(0.05, 0.8) * seconds
            waits_for_save = kills % 2 == 0
            while process.is_alive() and time.monotonic() < deadline:
                if waits_for_save and any((directory / "checkpoints").glob("*.tmp")):
                    inside_saves += 1
                    break
                time.sleep(0.001)
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        assert run_to_end(overrides) == 0
        assert metrics_of(directory) == metrics_of(whole)
        assert not list((directory / "checkpoints").glob("*.tmp"))
        runs += 1
    assert inside_saves >= 3


def stop_at(directory: Path, overrides: list[str], step: int) -> None:
    """Runs until a checkpoint of `step` is committed, then kills."""
    (process,) = spawn_ranks(overrides, 1)
    committed = directory / "checkpoints" / f"step_{step:08d}"
    deadline = time.monotonic() + 60
    while not committed.exists():
        assert process.is_alive(), f"ended with {process.exitcode}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()


@pytest.mark.parametrize("forgets", ["", "cursor", "random", "bias", "optimizer"])
def test_whatever_a_checkpoint_forgets_shows(
    uninterrupted: tuple[Path, float], corpus: Corpus, tmp_path: Path, forgets: str
) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, STEPS)
    stop_at(directory, overrides, 8)
    assert run_to_end(overrides, forgets=forgets) == 0
    is_equal = metrics_of(directory) == metrics_of(uninterrupted[0])
    assert is_equal == (forgets == ""), f"forgetting {forgets!r} should change the run"


def test_a_flipped_bit_falls_back_and_ends_the_same(
    uninterrupted: tuple[Path, float], corpus: Corpus, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, STEPS)
    stop_at(directory, overrides, 8)
    newest = max((directory / "checkpoints").glob("step_????????"))
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0x10
    shard.write_bytes(content)
    assert run_to_end(overrides) == 0
    assert "set aside" in log_path(overrides).read_text()
    assert metrics_of(directory) == metrics_of(uninterrupted[0])
    assert list((directory / "checkpoints").glob("*.corrupt"))


def test_a_signal_saves_and_asks_to_be_started_again(
    uninterrupted: tuple[Path, float], corpus: Corpus, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, STEPS, "checkpoint.every=1000")
    (process,) = spawn_ranks(overrides, 1)
    wait_for_metrics(directory, [process])
    os.kill(process.pid or 0, signal.SIGUSR1)
    process.join(60)
    assert process.exitcode == STOPPED
    assert (directory / "REQUEUE").exists()
    assert run_to_end(overrides) == 0
    assert not (directory / "REQUEUE").exists()
    assert metrics_of(directory) == metrics_of(uninterrupted[0])


def test_a_run_directory_in_use_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, "train.steps=2000")
    (process,) = spawn_ranks(overrides, 1)
    wait_for_metrics(directory, [process])
    assert run_to_end(overrides) == 64
    assert "run.dir" in log_path(overrides).read_text()
    process.kill()
    process.join()


def test_another_config_in_the_same_directory_is_refused_key_by_key(
    uninterrupted: tuple[Path, float], corpus: Corpus
) -> None:
    directory, _ = uninterrupted
    before = (directory / "metrics.jsonl").read_bytes()
    overrides = corpus.overrides(directory, STEPS, "optim.lr=0.02", "model.depth=3")
    assert run_to_end(overrides) == 64
    errors = log_path(overrides).read_text()
    assert "optim.lr" in errors
    assert "model.depth" in errors
    assert (directory / "metrics.jsonl").read_bytes() == before
