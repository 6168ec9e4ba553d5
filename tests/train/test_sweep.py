"""Sweeps: each choice is a run of its own, those that fail are named, and a table closes them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.errors import STOPPED, ConfigError, NumericsError
from conf.overrides import sweep_jobs
from tests.train.conftest import Corpus
from train.loop import sweep_table
from train.loop.hydra_line import told_apart
from train.loop.sweep_table import Ended, show_sweep

ROOT = Path(__file__).parents[2]
# What a loaded machine may take for what takes seconds.
PATIENCE = 240


def start(directory: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command in a directory, where names of runs are short enough for a table."""
    return subprocess.Popen(
        [sys.executable, "-m", "train", "-m", *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sweep(directory: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    with start(directory, *arguments, **environment) as process:
        try:
            said, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    return process.returncode, said, errors


def table(said: str) -> list[list[str]]:
    """The rows of the table that closes a sweep."""
    lines = said[said.rindex("Sweep") :].splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_go_on(corpus: Corpus, tmp_path: Path) -> None:
    keys = ("train.steps=3", "train.max_skipped=0", "optim.lr=1e-9,1e30,0.02", "schedule.warmup_steps=0")
    code, said, errors = sweep(tmp_path, *corpus.overrides(Path("sweep"), *keys))
    assert code == NumericsError.exit_code, errors
    assert re.search(r"^error: sweep/1 \(optim.lr=1e\+?30\): step \d: loss nan", errors, re.MULTILINE), errors
    assert "Traceback" not in errors
    scores = {}
    for number, rate in ((0, 1e-9), (2, 0.02)):
        run = tmp_path / "sweep" / str(number)
        assert json.loads((run / "config.json").read_text())["optim"]["lr"] == rate
        result = json.loads((run / "result.json").read_text())
        assert (result["steps"], result["run directory"]) == (3, f"sweep/{number}")
        scores[number] = f"{result['held-out loss (nats per token)']:.4f} held out"
    rows = table(said)
    assert [(row[0], row[1], row[3]) for row in rows[:2]] == [
        ("sweep/2", scores[2], "done"),
        ("sweep/0", scores[0], "done"),
    ]
    assert [row[2] for row in rows[:2]] == ["optim.lr=0.02", "optim.lr=1e-09"]
    assert (rows[2][0], rows[2][3]) == ("sweep/1", "failed with 70")


@pytest.mark.slow
def test_a_request_to_stop_ends_the_sweep(corpus: Corpus, tmp_path: Path) -> None:
    keys = ("train.steps=5000", "checkpoint.every=10000", "optim.lr=0.01,0.002,0.003")
    with start(tmp_path, *corpus.overrides(Path("sweep"), *keys)) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not (tmp_path / "sweep/0/metrics.jsonl").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            said, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == STOPPED, errors
    (saved,) = (tmp_path / "sweep/0/checkpoints").iterdir()
    assert (saved / "manifest.json").exists()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["0"]
    rows = table(said)
    assert [row[0] for row in rows] == ["sweep/0", "sweep/1", "sweep/2"]
    assert [row[3] for row in rows] == ["stopped, saved", "not started", "not started"]


def test_a_table_puts_the_best_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, held_out: float | None, losses: list[float | None]) -> str:
        (tmp_path / name).mkdir()
        if held_out is not None:
            result = {"held-out loss (nats per token)": held_out}
            (tmp_path / name / "result.json").write_text(json.dumps(result))
        lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
        return str(tmp_path / name)

    runs = [
        Ended("never", "lr=6"),
        # A loss of training is not one of held-out documents, so it stands behind these.
        Ended(run("failed", None, [3.0, 0.25, None]), "lr=1", 70, is_claimed=True),
        Ended(run("worse", 2.5, [9.0]), "lr=2", 0, is_claimed=True),
        Ended(run("stopped", None, [0.125]), "lr=4", STOPPED, is_claimed=True),
        # What stands in the directory is another run's.
        Ended(run("taken", 0.5, [0.5]), "lr=5", 64),
        Ended(run("better", 1.5, [8.0]), "lr=3", 0, is_claimed=True),
    ]
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(sweep_table, "print_table", lambda title, rows, head: shown.append(rows))
    show_sweep(runs)
    assert [(Path(name).name, *row) for name, row in shown[0].items()] == [
        ("better", "1.5000 held out", "lr=3", "done"),
        ("worse", "2.5000 held out", "lr=2", "done"),
        ("stopped", "0.1250 at step 1", "lr=4", "stopped, saved"),
        ("failed", "0.2500 at step 2", "lr=1", "failed with 70"),
        ("never", "none", "lr=6", "not started"),
        ("taken", "none", "lr=5", "failed with 64"),
    ]


def test_what_does_not_fit_in_some_runs_is_named_before_the_first(corpus: Corpus, tmp_path: Path) -> None:
    keys = ("mixer.gdn.kye_dim=3", "parallel.pp=1,2", "optim.lr=0.1,0.2")
    code, _, errors = sweep(tmp_path, *corpus.overrides(Path("sweep"), *keys))
    assert code == 64, errors
    lines = errors.splitlines()
    assert any("mixer.gdn.kye_dim: unknown key" in line and "in the run" not in line for line in lines), lines
    assert any("(in the run of parallel.pp=2, optim.lr=0.1 and 1 more)" in line for line in lines), lines
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_of_several_processes_is_refused(tmp_path: Path) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code, _, errors = sweep(tmp_path, "recipe=smoke", "optim.lr=1,2", **ranks)
    assert code == 64
    assert errors == "error: -m: a sweep has one process; found 2; start each of its runs by itself\n"


def test_every_combination_is_a_run() -> None:
    assert sweep_jobs(["a=1,2", "b='x,y'", "+c=range(0,2)"]) == [
        ["a=1", "b='x,y'", "+c=0"],
        ["a=1", "b='x,y'", "+c=1"],
        ["a=2", "b='x,y'", "+c=0"],
        ["a=2", "b='x,y'", "+c=1"],
    ]
    assert sweep_jobs(["optim=glob(*)"]) == [["optim=adamw"], ["optim=lion"]]
    with pytest.raises(ConfigError, match=r"a=interval") as caught:
        sweep_jobs(["a=interval(0,1)", "c", "b=1"])
    assert len(caught.value.violations) == 2


def test_all_typos_in_a_sweep_are_named(corpus: Corpus, tmp_path: Path) -> None:
    wrong = ("train.steps=-1", "optim.lrr=0.01,0.002", "modle.width=8")
    code, _, errors = sweep(tmp_path, *corpus.overrides(Path("sweep"), *wrong))
    assert code == 64, errors
    for said in ("train.steps: ", "did you mean optim.lr?", "did you mean model?"):
        assert said in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_in_a_sweep_is_named(tmp_path: Path) -> None:
    code, _, errors = sweep(tmp_path, "optim=adamw,lyon", "optim.lr=1e-3,3e-3")
    assert code == 64, errors
    assert "did you mean lion?" in errors


def test_flags_keep_the_words_that_belong_to_them() -> None:
    flags, typed = told_apart(["--cfg", "job", "recipe=smoke", "-m", "optim.lr=1,2"])
    assert flags == ["--cfg", "job", "-m"]
    assert typed == ["recipe=smoke", "optim.lr=1,2"]
