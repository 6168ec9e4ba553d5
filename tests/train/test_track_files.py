"""The record of a run: strict JSON, every bit of a float, and no trace of a kill after a resume."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from conf.compose import CONF_DIR, validate
from conf.errors import ConfigError, StorageError
from train.checkpoint.config import CheckpointConfig
from train.track import line_file
from train.track import tracker as tracker_module
from train.track.config import TrackConfig
from train.track.metrics_file import MetricsFile, read
from train.track.tracker import EVALUATIONS, METRICS, Tracker

ROOT = Path(__file__).parents[2]
DISABLED = TrackConfig(
    wandb="disabled", project="p", entity=None, name=None, group=None, tags=(), router_every=None,
    log_every=10, timeout_seconds=1.0,
)  # fmt: skip


def line_of(step: int, seconds: float = 0.0) -> dict[str, Any]:
    loss = float("nan") if step % 7 == 0 else 10 / (step + 0.1)
    return {
        "step": step,
        "loss": loss,
        "lr": 1e-4 / 3,
        "grad_norm": 0.1 * step,
        "tokens": 64 * step,
        "seconds": seconds,
    }


@given(st.lists(st.floats(), max_size=8))
def test_finite_floats_keep_every_bit_and_others_become_null(
    tmp_path_factory: Any, values: list[float]
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    file = MetricsFile(path)
    for step, value in enumerate(values):
        file.append({"step": step, "loss": value})
    file.close()
    found = [line["loss"] for line in read(path)]
    expected = [value.hex() if math.isfinite(value) else None for value in values]
    assert [None if value is None else float(value).hex() for value in found] == expected
    assert b"NaN" not in b"".join([path.read_bytes()] if values else [])


@given(st.integers(0, 12), st.integers(0, 60))
def test_truncation_keeps_the_bytes_of_earlier_steps(tmp_path_factory: Any, keep: int, torn: int) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 11):
        file.append(line_of(step))
    file.close()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(whole + lines[0][:torn].rstrip(b"\n"))
    file.truncate_after(keep)
    assert path.read_bytes() == b"".join(lines[:keep])
    file.append(line_of(11))
    assert [line["step"] for line in read(path)] == [*range(1, min(keep, 10) + 1), 11]
    file.close()


def test_nothing_to_truncate_makes_no_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").truncate_after(3)
    assert list(tmp_path.iterdir()) == []
    assert read(tmp_path / "metrics.jsonl") == []


def test_a_directory_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot write"):
        MetricsFile(tmp_path / "metrics.jsonl").append({"step": 1})


def test_lines_that_a_full_disk_refuses_wait_and_none_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file.append({"step": step})
        file.sync()
    assert capsys.readouterr().out.count("the disk is full") == 1
    path.unlink()
    file.append({"step": 4})
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]
    assert "nothing is missing" in capsys.readouterr().out
    file.close()


def test_lines_that_no_disk_ever_takes_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.append({"step": step})
    file.close()
    assert "2 lines of it are lost" in capsys.readouterr().out
    monkeypatch.setattr(line_file, "MOST_WAITING", 20)
    file.append({"step": 3})
    with pytest.raises(StorageError, match="the disk is full"):
        file.append({"step": 4})


def test_what_is_cut_off_stands_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / METRICS
    numbers = '"loss": 1.0, "lr": 0.1, "grad_norm": null, "seconds": 1'
    lines = [f'{{"step": {step}, {numbers}}}\n' for step in (1, 3, 4, 5)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    tracker = Tracker(DISABLED, tmp_path, "id", {}, {}, 0, 10)
    tracker.resume(4)
    tracker.close()
    assert path.read_text() == "".join(lines[:3])
    assert (tmp_path / "metrics.undone.jsonl").read_text() == lines[3] + '{"step": 6, "lo\n'
    said = capsys.readouterr().out
    assert "1 lines after step 4 put aside" in said
    assert "no line for 1 of the steps up to 4" in said
    path.write_text(lines[0] + lines[3])
    tracker.resume(1)
    tracker.close()
    assert (tmp_path / "metrics.undone.jsonl").read_text() == lines[3] + '{"step": 6, "lo\n' + lines[3]


def run_to(total: int, run_dir: Path, resume_at: int) -> None:
    """What the loop does, for another process: says each step that is on disk."""
    tracker = Tracker(DISABLED, run_dir, "id", {}, {}, 0, total)
    tracker.resume(resume_at)
    for step in range(resume_at + 1, total + 1):
        tracker.log(step, line_of(step, seconds=resume_at + 0.5))
        if step % 5 == 0:
            tracker.log_evaluation(step, {"loss": 1 / step}, 0.5)
        print(f"at {step}", flush=True)
    tracker.close()


def test_a_killed_and_resumed_run_leaves_the_files_of_an_unbroken_one(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.train.test_track_files import run_to; "
        "run_to(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))"
    )
    broken = tmp_path / "broken"
    for resume_at, kill_at in ((0, 13), (10, 21), (5, 9)):
        process = subprocess.Popen(
            [sys.executable, "-c", script, "100000", str(broken), str(resume_at)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        while process.stdout.readline() != f"at {kill_at}\n":
            assert process.poll() is None, "the run ended by itself"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # And the kill tears a line.
        with (broken / METRICS).open("ab") as file:
            file.write(b'{"step": 99, "lo')
    run_to(30, broken, 5)
    run_to(30, tmp_path / "whole", 0)
    for name in (METRICS, EVALUATIONS):
        without_time = [
            [{key: value for key, value in line.items() if key != "seconds"} for line in read(run / name)]
            for run in (broken, tmp_path / "whole")
        ]
        assert without_time[0] == without_time[1]
    assert [line["step"] for line in read(broken / METRICS)] == list(range(1, 31))
    assert [line["step"] for line in read(broken / EVALUATIONS)] == [5, 10, 15, 20, 25, 30]


def test_an_evaluation_of_the_same_step_replaces_the_first(tmp_path: Path) -> None:
    tracker = Tracker(DISABLED, tmp_path, "id", {}, {}, 0, 10)
    tracker.resume(0)
    for loss in (3.0, 2.0):
        tracker.log_evaluation(5, {"loss": loss, "targets": 7}, 0.5)
    tracker.close()
    assert tracker.evaluations() == [{"step": 5, "loss": 2.0, "targets": 7}]


def test_other_ranks_write_and_show_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "WandbSink", None)
    offline = DISABLED.model_copy(update={"wandb": "offline"})
    tracker = Tracker(offline, tmp_path, "id", {}, {}, 1, 10)
    tracker.resume(0)
    tracker.log(1, line_of(1))
    tracker.log_evaluation(1, {"loss": 1.0}, 0.5)
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


class Sink:
    """Stands in for wandb: remembers what it is given."""

    made: "Sink"

    def __init__(self, config: TrackConfig, directory: Path, run_id: str, run_config: dict[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self.closed: bool | None = None
        self.run_id = run_id
        Sink.made = self

    def log(self, values: dict[str, Any], kind: str) -> None:
        self.lines.append(values)

    def close(self, *, is_failed: bool) -> None:
        self.closed = is_failed


def test_wandb_gets_the_panels_under_the_steps_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "WandbSink", Sink)
    tracker = Tracker(DISABLED.model_copy(update={"wandb": "offline"}), tmp_path, "abc", {}, {}, 0, 10)
    tracker.resume(3)
    tracker.log(4, line_of(4) | {"loss/cross_entropy": 2.5})
    tracker.log_evaluation(4, {"loss": 2.25}, 0.5)
    tracker.close(RuntimeError("lost"))
    sink = Sink.made
    assert sink.lines == [{"step": 4, "loss/cross_entropy": 2.5}, {"step": 4, "loss/held_out_loss": 2.25}]
    assert (sink.run_id, sink.closed) == ("abc", True)


@pytest.mark.parametrize("option", ["offline", "online", "disabled"])
def test_every_option_of_the_group_is_a_valid_config(option: str) -> None:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "track" / f"{option}.yaml"))
    assert isinstance(tree, dict)
    config = validate(TrackConfig, {str(key): value for key, value in tree.items()})
    assert config.wandb == option


def test_limits_of_the_configs() -> None:
    with pytest.raises(ConfigError, match="timeout_seconds"):
        validate(TrackConfig, DISABLED.model_dump() | {"timeout_seconds": 15.5})
    for bad in ({"every": 0, "keep": 2}, {"every": 1, "keep": 1}):
        with pytest.raises(ValidationError):
            CheckpointConfig(**bad)


def test_lines_are_json_that_other_tools_read(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append(line_of(7))
    file.close()
    assert json.loads((tmp_path / "m.jsonl").read_text())["loss"] is None
