"""Ctrl-C and other requests to stop: a run saves, other commands end without a traceback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf.errors import INTERRUPTED, STOPPED, PeerError
from tests.train.conftest import Corpus
from tests.train.runs import log_path, metrics_of, run_to_end, spawn_ranks, wait_for_metrics

# What a loaded machine may take for what takes a second.
PATIENCE = 120
STEPS = "train.steps=40"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def started() -> Iterator[Start]:
    """Starts commands in sessions of their own, as a terminal has them; all have ended after the test."""
    processes: list[subprocess.Popen[str]] = []
    # What a shell starts in the background ignores SIGINT, and so would all that it starts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*command: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # As runs of the tests have it: sums of two threads may round otherwise.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, **pipes, env=environment, text=True, start_new_session=True)
        )
        return processes[-1]

    yield start
    signal.signal(signal.SIGINT, handler)
    for process in processes:
        with process:
            process.kill()


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    """A terminal sends the signal to the command and to all that it started."""
    os.killpg(process.pid, signal.SIGINT)


def wait_for(is_true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def maps_of(pid: int) -> str:
    """The files that a process has mapped; none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert run_to_end(corpus.overrides(directory, STEPS)) == 0
    return directory


@pytest.mark.slow
def test_ctrl_c_saves_and_keeps_what_follows_from_starting(
    started: Start, uninterrupted: Path, corpus: Corpus, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, STEPS, "checkpoint.every=1000")
    # A shell that starts a command for a terminal ignores the signal while it waits.
    line = 'trap : INT; "$@" && echo went on'
    process = started("bash", "-c", line, "bash", sys.executable, "-m", "train", *overrides)
    wait_for((directory / "metrics.jsonl").exists, process)
    press_ctrl_c(process)
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == STOPPED, errors
    assert "Traceback" not in errors
    assert "went on" not in said
    step = len(metrics_of(directory))
    assert 0 < step < 40
    assert (directory / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()
    assert f' stop step {step}/40 reason "asked to stop"\n' in said
    assert run_to_end(overrides) == 0
    assert metrics_of(directory) == metrics_of(uninterrupted)


def test_a_second_interrupt_ends_ranks_that_wait_for_others(corpus: Corpus, tmp_path: Path) -> None:
    overrides = corpus.overrides(tmp_path / "run", "train.steps=2000")
    ranks = spawn_ranks(overrides, 2)
    try:
        wait_for_metrics(tmp_path / "run", ranks)
        # The other stands still: this one waits in a collective, for parallel.timeout_seconds by itself.
        pids = [process.pid or 0 for process in ranks]
        os.kill(pids[1], signal.SIGSTOP)
        os.kill(pids[0], signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        while "asked to stop" not in log_path(overrides).read_text():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(pids[0], signal.SIGINT)
        ranks[0].join(PATIENCE)
        assert ranks[0].exitcode == INTERRUPTED
        os.kill(pids[1], signal.SIGCONT)
        ranks[1].join(PATIENCE)
        assert ranks[1].exitcode == PeerError.exit_code
    finally:
        for process in ranks:
            process.kill()
    said = log_path(overrides).read_text()
    assert "interrupted" in said.splitlines()
    assert "Traceback" not in said


def test_a_signal_to_any_rank_stops_all(corpus: Corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, "train.steps=2000", "checkpoint.every=1000")
    ranks = spawn_ranks(overrides, 2)
    wait_for_metrics(directory, ranks)
    os.kill(ranks[1].pid or 0, signal.SIGTERM)
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [STOPPED, STOPPED]
    (saved,) = (directory / "checkpoints").iterdir()
    assert saved.name == f"step_{len(metrics_of(directory)):08d}"


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED, errors
    assert errors.splitlines()[-1:] == ["interrupted"]
    assert "Traceback" not in errors


def test_other_commands_end_with_a_line(started: Start, uninterrupted: Path) -> None:
    process = started(sys.executable, "-m", "train.evaluate", f"run={uninterrupted}")
    # Torch is imported once the command does what it is asked.
    wait_for(lambda: "libtorch" in maps_of(process.pid), process)
    press_ctrl_c(process)
    assert_interrupted(process)


def test_processes_that_tokenise_end_without_a_word(started: Start, corpus: Corpus, tmp_path: Path) -> None:
    keys = (
        "data.workers=2",
        "data.held_out=0.15",
        "data.tokenizer.vocab_size=400",
        "data.tokenizer.train_bytes=60000",
    )
    where = (f"data.directory={tmp_path / 'tokens'}", f"data.corpora.documents.source={corpus.tree}")
    process = started(sys.executable, "-m", "data.prepare", "data=text", *where, *keys)
    # Python hears the signal from its start on; the process answers once it has imported what it works with.
    wait_for(lambda: any("numpy" in maps_of(child) for child in children_of(process.pid)), process)
    press_ctrl_c(process)
    assert_interrupted(process)
