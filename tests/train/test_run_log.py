"""The lines of a run: one for each event and every so many steps, the same ones printed and kept."""

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.errors import StorageError
from train.track import run_log
from train.track.run_log import LOG, RunLog, duration

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "


made: list[RunLog] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    for log in made:
        log._file.close()
    made.clear()


def log_in(directory: Path, every: int = 10, *, has_peak: bool = False) -> RunLog:
    made.append(RunLog(directory, 1000, every=every, ranks=8, has_peak=has_peak))
    return made[-1]


def step_of(step: int, **more: Any) -> dict[str, Any]:
    line = {"step": step, "loss": 5 / step, "grad_norm": 0.25, "lr": 1e-3, "seconds": 0.5}
    return line | {"speed/tokens_per_second": 8000.0, "speed/share_of_peak": 0.4} | more


def without_time(text: str) -> list[str]:
    """The lines, each of which must begin with a time of one width."""
    lines = text.splitlines()
    assert all(re.match(STAMP, line) for line in lines), text
    return [re.sub(STAMP, "", line) for line in lines]


def test_first_last_skipped_and_every_tenth_step_have_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])
    log = log_in(tmp_path)
    log.start("resume", 912, {})
    for step in range(913, 1001):
        log.step(step, step_of(step) | ({"optimizer/skipped": 1} if step == 915 else {}))
        clock[0] += 61
    log.close("end", 1000, {})
    printed = capsys.readouterr().out
    assert printed == (tmp_path / LOG).read_text()
    assert "\r" not in printed
    assert "\x1b" not in printed
    lines = without_time(printed)
    assert lines[0] == "resume step 912/1000"
    assert lines[-1] == "end step 1000/1000"
    steps = [int(line.split()[1].split("/")[0]) for line in lines[1:-1]]
    assert steps == [913, 915, 920, 930, 940, 950, 960, 970, 980, 990, 1000]
    assert lines[2].endswith(" skipped 1")
    # 80 steps of 61 s.
    numbers = "loss 0.0054 grad_norm 0.250 lr 1.00e-03 tokens/s 8000 tokens/s/rank 1000 left 1h21m"
    assert lines[3] == f"step 920/1000 {numbers}"


def test_speeds_are_those_of_all_steps_since_the_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_in(tmp_path, every=2, has_peak=True)
    log.step(1, step_of(1))
    # 8000 tokens in one second and 4000 in three.
    slow = {"speed/tokens_per_second": 4000 / 3, "speed/share_of_peak": 0.1, "seconds": 3.0}
    log.step(3, step_of(3, seconds=1.0) | {"memory/gpu_peak_gib": 61.25})
    log.step(4, step_of(4, **slow) | {"memory/gpu_peak_gib": 61.25})
    first, second = without_time(capsys.readouterr().out)
    assert "mfu 0.400" in first
    assert "gpu" not in first
    assert "tokens/s 3000 tokens/s/gpu 375 mfu 0.175 gpu_gib 61.2 left" in second


def test_no_share_of_a_peak_that_nobody_gave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_in(tmp_path).step(1, step_of(1))
    assert "mfu" not in capsys.readouterr().out


def test_a_value_is_one_word_and_an_event_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_in(tmp_path)
    values = {"none": None, "yes": True, "x": 0.123456789, "path": "a/b-c", "said": 'no "x"\n\x1bz'}
    log.event("fail", 3, values)
    (line,) = without_time(capsys.readouterr().out)
    assert line == r'fail step 3/1000 yes yes x 0.12346 path a/b-c said "no \"x\"\n\x1bz"'


def test_starts_append_to_one_file_and_a_torn_line_gets_an_end(tmp_path: Path) -> None:
    for step in (0, 3):
        log = log_in(tmp_path)
        log.start("start", step, {})
        log.event("save", step + 4, {"seconds": "0.10"})
        log.sync()
        # What a kill inside a write leaves.
        with (tmp_path / LOG).open("ab") as file:
            file.write(b"2026-11-29T17")
    lines = (tmp_path / LOG).read_text().split("\n")
    assert [re.sub(STAMP, "", line) for line in lines] == [
        "start step 0/1000", "save step 4/1000 seconds 0.10", "2026-11-29T17",
        "start step 3/1000", "save step 7/1000 seconds 0.10", "2026-11-29T17",
    ]  # fmt: skip


def test_a_full_disk_does_not_end_a_run_and_no_line_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LOG).symlink_to("/dev/full")
    log = log_in(tmp_path)
    log.start("start", 0, {})
    for step in (10, 20):
        log.step(step, step_of(step))
        log.sync()
    assert capsys.readouterr().out.count("the disk is full") == 1
    (tmp_path / LOG).unlink()
    log.close("end", 20, {})
    words = [line.split()[0] for line in without_time((tmp_path / LOG).read_text())]
    assert words == ["start", "step", "step", "end"]


def test_the_last_line_is_printed_where_the_file_takes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LOG).mkdir()
    log = log_in(tmp_path)
    with pytest.raises(StorageError, match=r"log\.txt"):
        log.event("save", 1, {})
    log.close("fail", 1, {"error": "x"})
    assert "fail step 1/1000 error x\n" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_and_the_file_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    log = log_in(tmp_path)
    log.start("start", 0, {})
    log.step(1, step_of(1))
    log.event("save", 1, {})
    log.step(1000, step_of(1000))
    log.close("end", 1000, {})
    shown = terminal.getvalue()
    assert "1000/1000" in shown
    assert "loss 0.005" in shown
    assert "save step 1/1000" in shown
    assert "grad_norm" not in shown
    kept = [line.split(" loss")[0] for line in without_time((tmp_path / LOG).read_text())]
    assert kept == [
        "start step 0/1000", "step 1/1000", "save step 1/1000", "step 1000/1000", "end step 1000/1000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (90061, "1d01h"), (8e6, "92d14h")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
