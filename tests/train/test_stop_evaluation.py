"""A request to stop that comes during an evaluation ends it; the checkpoint and the records are right."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from conf.errors import STOPPED
from tests.train.conftest import Corpus
from tests.train.runs import free_port, log_path, metrics_of, run_to_end, spawn, train_here

PATIENCE = 120
# One held-out window at a time makes the most rounds.
KEYS = ("train.steps=8", "train.micro_batch=1", "train.evaluate_rows=1000")


def train_counted(overrides: list[str], rank: int, size: int, port: int, rounds: str) -> None:
    """A run that adds a byte to a file for each round of an evaluation, and takes its time for it."""
    from data.loader import Loader

    held_out = Loader.held_out

    def counted(*arguments: Any) -> Any:
        with open(f"{rounds}_{rank}", "ab") as file:
            file.write(b".")
        time.sleep(0.05)
        return held_out(*arguments)

    Loader.held_out = counted
    train_here(overrides, rank, size, port)


def count(rounds: Path, rank: int = 0) -> int:
    path = Path(f"{rounds}_{rank}")
    return path.stat().st_size if path.exists() else 0


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "more", "step"),
    [
        (1, ("train.evaluate_every=4", "checkpoint.every=1000"), 4),
        (2, ("train.evaluate_every=4", "checkpoint.every=4"), 4),
        (1, ("train.evaluate_every=1000", "train.final_rows=1000"), 8),
    ],
    ids=["not saved before", "two ranks, saved before", "at the end"],
)
def test_an_evaluation_ends_for_a_request_to_stop(
    corpus: Corpus, tmp_path: Path, size: int, more: tuple[str, ...], step: int
) -> None:
    whole = corpus.overrides(tmp_path / "whole", *KEYS, *more)
    assert run_to_end(whole, size) == 0
    windows = sum(line["targets"] for line in evaluations_of(tmp_path / "whole")[:1]) // 32
    assert windows > 100
    directory, rounds, port = tmp_path / "run", tmp_path / "rounds", free_port()
    overrides = corpus.overrides(directory, *KEYS, *more)
    ranks = [spawn(train_counted, overrides, rank, size, port, str(rounds)) for rank in range(size)]
    deadline = time.monotonic() + PATIENCE
    while not count(rounds):
        assert all(process.is_alive() for process in ranks), log_path(overrides).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    # All ranks stop in the same round, whichever hears of it.
    os.kill(ranks[-1].pid or 0, signal.SIGTERM)
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [STOPPED] * size
    assert {count(rounds, rank) for rank in range(size)} == {count(rounds)}
    assert count(rounds) < windows / size / 2
    assert max(path.name for path in (directory / "checkpoints").iterdir()) == f"step_{step:08d}"
    assert evaluations_of(directory) == []
    assert not (directory / "result.json").exists()
    assert run_to_end(overrides, size) == 0
    assert metrics_of(directory) == metrics_of(tmp_path / "whole")
    assert evaluations_of(directory) == evaluations_of(tmp_path / "whole")
    assert (directory / "result.json").exists()
