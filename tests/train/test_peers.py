"""A run that lost a process ends with the cause, keeps its newest save, and goes on from it."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.train.conftest import Corpus
from tests.train.runs import log_path, metrics_of, run_to_end, spawn_ranks
from train.checkpoint.store import verify

DEADLINE = 30  # seconds; ranks wait 16 of them for each other, which a busy machine must not take by itself
TEARDOWN = 5  # seconds that a process takes to end, on a machine that is busy
START = 60  # seconds until ranks are at work
KEYS = ("train.steps=40", "checkpoint.every=5")


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert run_to_end(corpus.overrides(directory, *KEYS), 2) == 0
    return directory


@pytest.mark.prove
@pytest.mark.xdist_group("peers")
@pytest.mark.parametrize(
    ("victim", "number", "what"),
    [(1, signal.SIGKILL, "ended without a word"), (0, signal.SIGSTOP, "hangs")],
    ids=["killed", "stopped"],
)
def test_a_rank_lost_in_a_step_is_named_and_nothing_is_lost(
    corpus: Corpus, uninterrupted: Path, tmp_path: Path, victim: int, number: int, what: str
) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, *KEYS, f"parallel.timeout_seconds={DEADLINE}")
    ranks = spawn_ranks(overrides, 2)
    try:
        deadline = time.monotonic() + START
        while not (directory / "metrics.jsonl").exists() or len(metrics_of(directory)) < 7:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(ranks[victim].pid or 0, number)
        ranks[1 - victim].join(DEADLINE + TEARDOWN)
        assert ranks[1 - victim].exitcode == 75, log_path(overrides).read_text()
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = log_path(overrides).read_text()
    assert "Traceback" not in said
    assert f"rank {victim} (dp_shard {victim})" in said
    assert what in said
    newest = max((directory / "checkpoints").glob("step_????????"))
    assert not verify(newest)
    assert run_to_end(corpus.overrides(directory, *KEYS), 2) == 0
    assert f"resume step {int(newest.name.removeprefix('step_'))}/" in log_path(overrides).read_text()
    assert metrics_of(directory) == metrics_of(uninterrupted)
