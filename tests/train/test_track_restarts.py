"""A run that is killed and goes on is one run in Weights & Biases, each step once, under its names."""

import glob
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conf.errors import STOPPED
from tests.train.conftest import Corpus
from tests.train.runs import run_to_end, spawn, train_here
from train.track.config import TrackConfig
from train.track.panels import heat_map, table
from train.track.wandb_sink import WandbSink

KEYS = ("track=offline", "train.steps=30", "train.evaluate_every=5", "checkpoint.every=10")
OFFLINE = TrackConfig(
    wandb="offline", project="weft", entity=None, name="3 lr=1", group="a sweep", tags=(), router_every=1,
    log_every=1, timeout_seconds=15.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def starts_of(run_dir: Path) -> list[list[dict[str, Any]]]:
    """The records of each start of a run, oldest first, as wandb's own reader prints them."""
    logs = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    return [json.loads(f"[{','.join(read(log))}]") for log in logs]


def read(log: Path) -> list[str]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def steps_of(starts: list[list[dict[str, Any]]], name: str) -> list[int]:
    """The steps that have a value of that name, in the order in which they were recorded."""
    items = [record["history"]["item"] for records in starts for record in records if "history" in record]
    return [item["step"] for item in items if name in item]


def run_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    return next(record["run"] for record in records if record["type"] == "run")


def started_in(run_dir: Path) -> int:
    """How many starts have a step."""
    log = run_dir / "log.txt"
    return len(re.findall(r"(start|resume) step .*\n.* step \d", log.read_text())) if log.exists() else 0


def lines_in(run_dir: Path) -> int:
    """Whole lines of metrics; the last one may be under way."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def end_at(run_dir: Path, overrides: list[str], step: int, how: str) -> None:
    """One start of the run, killed or stopped once it has logged a step."""
    before, process = started_in(run_dir), spawn(train_here, overrides)
    deadline = time.monotonic() + 60
    # Before the line of the start, the steps that an earlier one did stand in metrics.jsonl.
    while started_in(run_dir) <= before or lines_in(run_dir) < step:
        assert process.is_alive(), process.exitcode
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if how == "kill":
        process.kill()
    else:
        (run_dir / "PREEMPT").touch()
    process.join(60)
    assert process.exitcode == (-9 if how == "kill" else STOPPED)


def wait_for_end_of_records(run_dir: Path, starts: int) -> None:
    """A killed run leaves it to another process to write what it had sent."""
    deadline = time.monotonic() + 60
    while len(found := starts_of(run_dir)) < starts or not any(r["type"] == "exit" for r in found[-1]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_starts_of_one_run_are_one_line(corpus: Corpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = corpus.overrides(run_dir, *KEYS)
    # The first kill is after evaluations of steps that are done again, the second before it got beyond them.
    end_at(run_dir, overrides, 18, "kill")
    wait_for_end_of_records(run_dir, 1)
    end_at(run_dir, overrides, 12, "kill")
    wait_for_end_of_records(run_dir, 2)
    end_at(run_dir, overrides, 22, "stop")
    assert run_to_end(overrides) == 0
    starts = starts_of(run_dir)
    assert len(starts) == 4
    assert {run_of(records)["run_id"] for records in starts} == {
        json.loads((run_dir / "run.json").read_text())["id"]
    }
    assert steps_of(starts, "loss/cross_entropy") == [*range(1, 31)]
    assert steps_of(starts, "loss/held_out_loss") == [5, 10, 15, 20, 25, 30]
    # Those before the end of the second start are of the first.
    assert steps_of(starts[1:2], "loss/cross_entropy")[:1] in ([], [19])
    said = (run_dir / "log.txt").read_text()
    assert said.count(" resume step 10/30 seconds ") == 2
    assert said.count(' reason "asked to stop"') == 1


def test_a_run_says_what_it_is_called_and_where_it_was_started(corpus: Corpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "big"
    keys = ("train.steps=4", "track=offline", "track.router_every=2", "sample.every=2", "sample.tokens=3")
    assert run_to_end(corpus.overrides(run_dir, *keys)) == 0
    (records,) = starts_of(run_dir)
    run = run_of(records)
    assert (run["display_name"], run["run_group"]) == ("big", "qwen3_next_small gdn attn")
    launch = run["config"]["update"]["launch"]
    assert launch["ranks"] == 1
    assert {"host", "commit", "uncommitted", "slurm_job", "command"} <= launch.keys()
    for name, steps in (("router/load", [2, 4]), ("router/load_histogram", [2, 4]), ("sample/text", [2, 4])):
        assert steps_of([records], f"{name}._type") == steps, name
    names = {name for record in records if "history" in record for name in record["history"]["item"]}
    assert {"router/max_violation", "router/mean_violation", "router/entropy"} <= names
    assert not [name for name in names if name.startswith("router/") and name.endswith(("_0", "_1"))]
    # The picture of step 4 and the table with both samples lie beside the records.
    files = glob.glob(f"{run_dir}/wandb/offline-run-*/files/media/**/*", recursive=True)
    (tables,) = [sorted(Path(path) for path in files if path.endswith(".table.json"))]
    rows = [json.loads(path.read_text())["data"] for path in tables]
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    expected = [[sample["step"], sample["prompt"], sample["text"]] for sample in samples]
    assert sorted(rows, key=len) == [expected[:1], expected]
    assert [row[:2] for row in expected] == [[2, "def "], [4, "def "]]


def test_the_picture_of_the_load_has_a_layer_per_row_and_an_expert_per_column(tmp_path: Path) -> None:
    sink = WandbSink(OFFLINE, tmp_path, "id", {})
    # The last expert of the first layer takes all.
    sink.log({"step": 1, "router/load": heat_map([[0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])}, "router")
    sink.log({"step": 1, "sample/text": table(("step", "text"), [[1, "a"]])}, "sample")
    sink.close()
    (name,) = glob.glob(f"{tmp_path}/wandb/offline-run-*/files/media/images/router/*")
    image = Image.open(name).convert("RGB")
    colours = {image.getpixel((x, y)) for x in range(image.width) for y in range(image.height)}
    # The ends of the scale, and a third of it.
    for colour in ((68, 1, 84), (253, 231, 37), (49, 104, 142)):
        assert any(max(abs(a - b) for a, b in zip(colour, found, strict=True)) < 3 for found in colours)
    (records,) = starts_of(tmp_path)
    run = run_of(records)
    assert (run["display_name"], run["run_group"]) == ("3 lr=1", "a sweep")
    (histogram,) = [
        record["history"]["item"]["router/load_histogram.values"]
        for record in records
        if "router/load_histogram.values" in record.get("history", {}).get("item", {})
    ]
    assert sum(histogram) == 6


FAKE_WANDB = """
import json, pathlib
class Settings:
    model_fields = {}
class Run:
    offline, summary = False, {"step": 5, "_held_out_step": 3, "_step": 9, "loss": 1.0}
    def __init__(self, directory): self.file = open(directory + "/logged", "a")
    def define_metric(self, *names, **more): pass
    def log(self, values): print(json.dumps(values), file=self.file, flush=True)
    def finish(self, exit_code): pass
def init(**settings): return Run(settings["dir"])
"""


def test_what_the_server_has_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sink = WandbSink(OFFLINE.model_copy(update={"wandb": "online"}), tmp_path, "id", {})
    for step in range(3, 8):
        sink.log({"step": step, "loss": 1.0})
        if step % 2:
            sink.log({"step": step, "held_out": 2.0}, "held_out")
    sink.close()
    assert [json.loads(line) for line in (tmp_path / "logged").read_text().splitlines()] == [
        {"_held_out_step": 5, "step": 5, "held_out": 2.0},
        {"step": 6, "loss": 1.0},
        {"step": 7, "loss": 1.0},
        {"_held_out_step": 7, "step": 7, "held_out": 2.0},
    ]


def test_a_start_without_records_hides_no_earlier_one(tmp_path: Path) -> None:
    for step in (1, 2):
        sink = WandbSink(OFFLINE, tmp_path, "id", {})
        for again in range(1, step + 1):
            sink.log({"step": again, "loss": 1.0})
        sink.close()
        # What a machine that fails right after a start leaves, and what it may make of the records.
        for number, content in enumerate((b"", b"torn")):
            folder = tmp_path / f"wandb/offline-run-2999{step}{number}01_000000-id"
            folder.mkdir()
            (folder / "run-id.wandb").write_bytes(content)
    assert steps_of(starts_of(tmp_path), "loss") == [1, 2]
