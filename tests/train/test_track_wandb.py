"""Weights & Biases records what it can and never holds up a run, whatever its server does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from train.track import wandb_process
from train.track.config import TrackConfig
from train.track.wandb_sink import WandbSink

ROOT = Path(__file__).parents[2]
SECRET = "canary" * 6 + "0000"


def config_of(mode: str, timeout_seconds: float = 15.0) -> TrackConfig:
    tree = {
        "wandb": mode, "project": "weft", "entity": None, "name": "a run", "group": "a group", "tags": ("x",),
        "router_every": 100, "log_every": 10, "timeout_seconds": timeout_seconds,
    }  # fmt: skip
    return TrackConfig.model_validate(tree)


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    # wandb refuses keys of another length.
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The records of the only run under `run_dir`, as wandb's own reader prints them."""
    (log,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def test_an_offline_run_has_every_line_under_the_id_of_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    start = time.monotonic()
    sink = WandbSink(config_of("offline"), run_dir, "run-id-1", {"lr": 0.1, "model": {"width": 8}})
    lines = [{"step": step, "loss/cross_entropy": 1 / step} for step in range(1, 51)]
    for line in lines:
        sink.log(line)
    sink.log({"step": 51, "loss/cross_entropy": float("nan")})
    assert time.monotonic() - start < 1, "construction and log must return at once"
    sink.close()
    assert sink.dropped == 0
    records = recorded(run_dir)
    found = history(records)
    assert found[:50] == lines
    assert found[50] == {"step": 51, "loss/cross_entropy": "NaN"}
    run = next(record["run"] for record in records if record["type"] == "run")
    assert run["run_id"] == "run-id-1"
    assert run["project"] == "weft"
    assert {key: value for key, value in run["config"]["update"].items() if key != "_wandb"} == {
        "lr": 0.1,
        "model": {"width": 8},
    }
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert {"glob_name": "*", "step_metric": "step"}.items() <= metrics[1].items()
    assert next(record["exit"] for record in records if record["type"] == "exit").get("exit_code", 0) == 0
    assert f"recorded in {run_dir / 'wandb'}" in capfd.readouterr().out
    # The environment of the run, and the key with it, is nowhere in what was recorded.
    for path in run_dir.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


@pytest.mark.slow
def test_the_starts_of_a_restarted_run_are_opened_and_sent_by_the_directory_above_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for start in (0, 2):
        sink = WandbSink(config_of("offline"), tmp_path, "run-id-1", {})
        for step in (start + 1, start + 2):
            sink.log({"step": step, "loss/cross_entropy": 1 / step})
        sink.close()
    offline = tmp_path / "wandb"
    printed = capfd.readouterr().out
    assert printed.count(f"`wandb leet {offline}` draws it, `wandb sync {offline}` sends it") == 2
    newest = json.loads(wandb("leet", "inspect", "--summary", "--json", str(offline)))
    assert newest["summary"]["step"] == 4
    assert "Would sync 2 run(s)" in wandb("sync", "--dry-run", str(offline))


def wandb(*arguments: str) -> str:
    command = [sys.executable, "-m", "wandb", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout + done.stderr


def test_a_failed_run_is_recorded_as_failed(tmp_path: Path) -> None:
    sink = WandbSink(config_of("offline"), tmp_path, "run-id-1", {})
    sink.log({"step": 1, "loss/cross_entropy": 1.0})
    sink.close(is_failed=True)
    assert [record["exit"]["exit_code"] for record in recorded(tmp_path) if record["type"] == "exit"] == [1]


@contextmanager
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def no_server() -> Iterator[str]:
    yield "http://127.0.0.1:9"


@pytest.mark.parametrize("server", [no_server, silent_server])
def test_a_short_run_is_over_in_time_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: Any
) -> None:
    with server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        start = time.monotonic()
        sink = WandbSink(config_of("online", timeout_seconds=2.0), tmp_path, "id", {})
        sink.log({"step": 1})
        assert time.monotonic() - start < 1
        group = group_of(sink)
        sink.close()
        assert time.monotonic() - start < 4
        assert is_gone(group, within=0.5)
    assert capfd.readouterr().out.count("wandb: off: not finished after 2 s; metrics.jsonl goes on\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("server", [no_server, silent_server])
def test_a_longer_run_records_itself_offline_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: Any
) -> None:
    with server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        sink = WandbSink(config_of("online", timeout_seconds=3.0), tmp_path, "id", {})
        sink.log({"step": 1, "loss/cross_entropy": 2.0})
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
            assert time.monotonic() < deadline, "no offline run"
            slowest = time.monotonic()
            sink.log({"step": 2})
            assert time.monotonic() - slowest < 0.5
            time.sleep(0.05)
        time.sleep(2)
        group = group_of(sink)
        sink.close()
        assert is_gone(group, within=0.5)
    assert history(recorded(tmp_path))[0] == {"step": 1, "loss/cross_entropy": 2.0}
    printed = capfd.readouterr().out
    assert printed.count("wandb: not online: ") == 1
    assert "for a later `wandb sync`" in printed


def test_no_account_is_not_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    sink = WandbSink(config_of("online"), tmp_path, "id", {})
    sink.log({"step": 1, "loss/cross_entropy": 2.0})
    sink.close()
    assert history(recorded(tmp_path)) == [{"step": 1, "loss/cross_entropy": 2.0}]
    assert "wandb: not online: No API key configured" in capfd.readouterr().out


def fake(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_process_that_reads_nothing_costs_old_lines_and_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = WandbSink(
        config_of("offline", timeout_seconds=0.5),
        tmp_path,
        "id",
        {},
        command=fake("import time; time.sleep(60)"),
    )
    start = time.monotonic()
    for step in range(6000):
        sink.log({"step": step, "padding": "x" * 100})
    assert time.monotonic() - start < 2
    assert sink.dropped > 3000
    start = time.monotonic()
    sink.close()
    assert time.monotonic() - start < 2
    printed = capsys.readouterr().out
    assert "off: not finished after 0.5 s" in printed
    assert f"{sink.dropped} lines dropped" in printed


def test_what_the_process_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"
    )
    sink = WandbSink(config_of("offline", timeout_seconds=2.0), tmp_path, "id", {}, command=fake(code))
    group = group_of(sink)
    sink.close()
    assert is_gone(group, within=1)


def test_the_oldest_lines_are_dropped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    late = f"import sys, time; time.sleep(1.5); open({str(out)!r}, 'w').write(sys.stdin.read())"
    sink = WandbSink(config_of("offline"), tmp_path, "id", {}, command=fake(late))
    for step in range(6000):
        sink.log({"step": step, "padding": "x" * 100})
    sink.close()
    steps = [json.loads(line)["log"]["step"] for line in out.read_text().splitlines()[1:-1]]
    assert steps[-900:] == list(range(5100, 6000))
    assert len(steps) == 6000 - sink.dropped


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("import sys; sys.exit(7)", ["wandb: off: its process ended with code 7; metrics.jsonl goes on"]),
        (
            "import os; os.kill(os.getpid(), 9)",
            ["wandb: off: its process ended with code -9; metrics.jsonl goes on"],
        ),
        (f"import sys; sys.exit({wandb_process.EXPLAINED})", []),
    ],
)
def test_a_process_that_dies_turns_the_sink_off_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, lines: list[str]
) -> None:
    sink = WandbSink(config_of("disabled"), tmp_path, "id", {}, command=fake(code))
    deadline = time.monotonic() + 20
    while not sink._is_off:
        assert time.monotonic() < deadline, "the death went unseen"
        sink.log({"step": 1})
        time.sleep(0.01)
    sink.log({"step": 2})
    sink.close()
    assert capsys.readouterr().out.splitlines() == lines


def test_a_process_that_cannot_start_turns_the_sink_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = WandbSink(config_of("offline"), tmp_path, "id", {}, command=("/nowhere/python",))
    sink.log({"step": 1})
    sink.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("wandb: off: cannot start its process")


def test_after_a_killed_run_its_lines_are_there_and_nothing_of_wandb_stays(tmp_path: Path) -> None:
    group = kill_a_run(tmp_path, f"""
while not list(Path({str(tmp_path)!r}).glob("wandb/offline-run-*/run-*.wandb")):
    time.sleep(0.05)
time.sleep(1)
""")  # fmt: skip
    assert is_gone(group, within=15)
    records = recorded(tmp_path)
    assert history(records) == [{"step": step} for step in range(20)]
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [1]


def test_a_hung_wandb_does_not_outlive_a_killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text(
        "import pathlib, time\n"
        "class Settings:\n    model_fields = {}\n"
        "def init(**settings):\n"
        "    pathlib.Path(settings['dir'], 'hangs').touch()\n    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    group = kill_a_run(tmp_path, f"""
while not Path({str(tmp_path)!r}, "hangs").exists():
    time.sleep(0.05)
""")  # fmt: skip
    assert is_gone(group, within=10)


def kill_a_run(run_dir: Path, wait: str) -> int:
    """Start a run that sends twenty lines, does `wait` and is killed; the process group of its wandb."""
    script = f"""
import os, signal, time
from pathlib import Path
from tests.train.test_track_wandb import config_of
from train.track.wandb_sink import WandbSink
sink = WandbSink(config_of("offline", 3.0), Path({str(run_dir)!r}), "id", {{}})
print(sink._process.pid, flush=True)
for step in range(20):
    sink.log({{"step": step}})
{wait}
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode == -9
    return int(done.stdout.split()[0])


def group_of(sink: WandbSink) -> int:
    assert sink._process is not None
    return sink._process.pid


def is_gone(group: int, within: float) -> bool:
    """Whether the process group has no live member, `within` seconds from now."""
    deadline = time.monotonic() + within
    while any(in_group(process, group) for process in psutil.process_iter()):
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
