"""A run directory has one owner at a time, and a dead owner owns nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import ConfigError, StorageError
from train.checkpoint.lock import RunLock

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from train.checkpoint.lock import RunLock; "
    "lock = RunLock(Path(sys.argv[1]), slurm_job_id='4711'); lock.__enter__(); print('held', flush=True); "
    "time.sleep(60)"
)


def test_a_second_process_is_told_who_holds_it_until_the_first_is_killed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as caught, RunLock(run_dir):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    (violation,) = caught.value.violations
    assert violation.key == "run.dir"
    for part in (
        str(run_dir),
        f"pid {holder.pid}",
        os.uname().nodename,
        "SLURM job 4711",
        "since 2",
        "choose",
    ):
        assert part in violation.message
    with RunLock(run_dir):
        pass


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"pid {os.getpid()}"), RunLock(tmp_path):
        pass


def test_it_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    with RunLock(tmp_path):
        pass
    assert (tmp_path / "lock").read_bytes() == b""


def test_a_holder_that_has_not_written_its_name_yet(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / "lock").write_bytes(b"")
        with pytest.raises(ConfigError, match=r"in use by pid \? on host \?"), RunLock(tmp_path):
            pass


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/run/lock: cannot write"), RunLock(tmp_path / "file" / "run"):
        pass
