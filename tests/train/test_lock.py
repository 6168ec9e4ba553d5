"""A run directory has one owner at a time, and a dead owner owns nothing."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conf.errors import ConfigError, PeerError, StorageError
from tests.train.states import make_state, names, open_store
from train.checkpoint.lock import RunLock
from train.checkpoint.owner_file import OwnerFile

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


def test_a_job_that_was_requeued_waits_for_its_own_lock(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    try:
        with pytest.raises(PeerError, match=f"pid {holder.pid} .*a process of this job"):
            RunLock(tmp_path, slurm_job_id="4711", lingers=0.3).__enter__()
        threading.Timer(0.3, holder.kill).start()
        with RunLock(tmp_path, slurm_job_id="4711", lingers=60):
            pass
    finally:
        holder.kill()
        holder.communicate()


# What a file system without locks says, in every process of this test.
NO_FLOCK = """
import errno, fcntl, os
def flock(descriptor, how):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
"""
BEAT = (
    "import sys, time; from pathlib import Path; from train.checkpoint.owner_file import OwnerFile; "
    "owner = OwnerFile(Path(sys.argv[1]) / 'owner', 0.05, 0.5); "
    "print('held' if owner.take({'pid': 0, 'host': 'elsewhere'}) is None else 'in use', flush=True); "
    "time.sleep(60)"
)


def start(script: str, directory: Path, says: str = "held\n") -> subprocess.Popen[str]:
    """A process that runs the script and has said so much."""
    command = [sys.executable, "-c", script, str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in iter(process.stdout.readline, ""):
        if line == says:
            return process
    raise AssertionError(process.communicate()[1])


def test_without_flock_a_run_directory_has_one_owner_too(tmp_path: Path) -> None:
    holder = start(NO_FLOCK + HOLD, tmp_path)
    try:
        other_job = NO_FLOCK + HOLD.replace("4711", "4712")
        second = subprocess.run(
            [sys.executable, "-c", other_job, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
        )
        said = "has no flock (Function not implemented); lock.owner and its heartbeat"
        assert second.stdout.count(said) == 1
        assert f"in use by pid {holder.pid} on host {os.uname().nodename} (SLURM job 4711)" in second.stderr
    finally:
        holder.kill()
        holder.communicate()
    # Its process is gone from this machine: nobody waits for its heart.
    begin = time.monotonic()
    third = start(NO_FLOCK + HOLD, tmp_path)
    third.kill()
    third.communicate()
    assert time.monotonic() - begin < 20


def test_an_owner_elsewhere_is_dead_once_its_heart_stands_still(tmp_path: Path) -> None:
    holder = start(BEAT, tmp_path)
    try:
        found = OwnerFile(tmp_path / "owner", 0.05, 2).take({})
        assert found is not None
        assert found["host"] == "elsewhere"
        holder.send_signal(signal.SIGSTOP)
        owner = OwnerFile(tmp_path / "owner", 0.05, 0.5)
        assert owner.take({"pid": 1, "host": "here"}) is None
        # It wakes, and finds that it lost the directory: two owners would be worse than none.
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(30) == PeerError.exit_code
        assert json.loads((tmp_path / "owner").read_bytes())["host"] == "here"
        owner.release()
        assert list(tmp_path.iterdir()) == []
    finally:
        holder.kill()
        holder.communicate()


def test_an_owner_that_has_not_written_yet_is_waited_for(tmp_path: Path) -> None:
    # It has made the file, and its first words come a moment later.
    (tmp_path / "owner").touch()
    words = json.dumps({"pid": 1, "host": "elsewhere", "beat": "000000000000"})
    threading.Timer(0.3, (tmp_path / "owner").write_text, (words,)).start()
    found = OwnerFile(tmp_path / "owner", 0.05, 5).take({"pid": 2, "host": "here"})
    assert found is not None
    assert found["pid"] == 1
    (tmp_path / "owner").write_text(words[:20])
    owner = OwnerFile(tmp_path / "owner", 0.05, 0.3)
    assert owner.take({"pid": 2, "host": "here"}) is None
    owner.release()


def test_of_many_that_find_a_dead_owner_one_follows(tmp_path: Path) -> None:
    (tmp_path / "owner").write_text(json.dumps({"pid": 1, "host": "elsewhere", "beat": "000000000007"}))
    owners = [OwnerFile(tmp_path / "owner", 0.05, 0.5) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: pair[1].take({"pid": pair[0], "host": "here"}), enumerate(owners)))
    (winner,) = [number for number, holder in enumerate(found) if holder is None]
    assert {holder["pid"] for holder in found if holder is not None} == {winner}
    owners[winner].release()


def test_a_directory_that_cannot_be_synced_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsync = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with RunLock(tmp_path):
        open_store(tmp_path).save(1, make_state(1), {})
    assert names(tmp_path) == ["step_00000001"]
    assert capsys.readouterr().out.count("cannot sync a directory") == 1
