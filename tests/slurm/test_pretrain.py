"""What the batch script does after the trainer ends, against stand-ins for SLURM's own commands."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from conf.errors import STOPPED

ROOT = Path(__file__).parents[2]

# Drops srun's flags and runs one task; forwards USR1 as srun does.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKE/srun.arguments"
while [[ $1 == --* ]]; do shift; done
trap 'again=1; kill -USR1 -- "-$task"' USR1
setsid "$@" &
task=$!
while again=""; wait "$task"; code=$?; [ -n "$again" ]; do :; done
exit "${SRUN_CODE:-$code}"
"""
# A requeue ends the batch shell by TERM.
SCONTROL = """#!/usr/bin/env bash
case $* in
  "show hostnames"*) echo n1; echo n2 ;;
  "-o show node n1") echo "NodeName=n1 NodeAddr=10.0.0.7 NodeHostName=n1" ;;
  requeue*) echo "$2" >>"$FAKE/requeued"; kill -TERM "$PPID" ;;
esac
"""
# The trainer's contract, as `python -m train` of the temporary repository.
TRAINER = """
import os, pathlib, signal, sys, time

print("ARGS", sys.argv[1:], flush=True)
mode, code = os.environ["MODE"], int(os.environ.get("CODE", "0"))
run = pathlib.Path(next(a for a in reversed(sys.argv) if "run.dir=" in a).split("=", 1)[1])
if mode == "wait":
    time.sleep(float(os.environ.get("BOOT", "0")))
    (run / "PREEMPT").unlink(missing_ok=True)
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    (run / "READY").touch()
    while not heard and not (run / "PREEMPT").exists():
        time.sleep(0.02)
    mode = "more"
sys.exit(85 if mode == "more" else code)
"""


class Site:
    """A repository with the batch script, and a SLURM that writes down what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.root, self.fake = folder / "repo", folder / "fake"
        (self.root / "slurm").mkdir(parents=True)
        (self.root / "train").mkdir()
        self.fake.mkdir()
        shutil.copy(ROOT / "slurm/pretrain.sbatch", self.root / "slurm")
        (self.root / "train/__main__.py").write_text(TRAINER)
        # The waits of the script are written down and cut short.
        sleep = '#!/bin/sh\necho "$1" >>"$FAKE/slept"\nexec /bin/sleep 0.1\n'
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", sleep)):
            (self.fake / name).write_text(text)
            (self.fake / name).chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The batch script as the batch step starts it."""
        slurm = {
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "6",
        }
        path = {"PATH": f"{self.fake}:{os.environ['PATH']}", "FAKE": str(self.fake)}
        return subprocess.Popen(
            ["bash", str(self.root / "slurm/pretrain.sbatch"), *arguments],
            env=os.environ | slurm | path | {"MODE": "done"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit code and log of one attempt."""
        process = self.start(*arguments, **environment)
        log, _ = process.communicate(timeout=60)
        return process.returncode, log

    def noted(self, name: str) -> list[str]:
        """Lines that a stand-in wrote."""
        path = self.fake / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_finished_run_ends_with_zero(site: Site) -> None:
    code, log = site.run("run.dir=out")
    assert code == 0, log
    assert site.noted("requeued") == []


def test_arguments_reach_the_trainer_unchanged(site: Site) -> None:
    tokens = ["a='3*(b c)'", 'p="x  y"', "q=$(reboot)", "r=*", "s="]
    code, log = site.run(*tokens)
    assert code == 0, log
    assert f"ARGS {[*tokens, 'run.dir=runs/slurm-17']}" in log
    assert (site.root / "runs/slurm-17").is_dir()


def test_one_run_directory_for_every_attempt_of_a_job(site: Site) -> None:
    for attempt, job in enumerate(("17", "17")):
        site.run(MODE="more", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=str(attempt))
    site.run(SLURM_JOB_ID="21", SLURM_ARRAY_JOB_ID="20", SLURM_ARRAY_TASK_ID="3")
    site.run("run.dir=a", "run.dir=b c")
    assert sorted(str(path.relative_to(site.root)) for path in site.root.glob("runs/*")) == [
        "runs/slurm-17",
        "runs/slurm-20_3",
    ]
    assert (site.root / "b c").is_dir()
    assert not (site.root / "a").exists()


def test_tasks_and_cpus_follow_the_allocation(site: Site) -> None:
    def flags(**environment: str) -> list[str]:
        site.run("run.dir=out", **environment)
        return [line for line in site.noted("srun.arguments") if line.startswith(("--ntasks", "--cpus"))]

    assert flags() == ["--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"]
    by_gpu = ["--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3"]
    assert flags(SLURM_GPUS_ON_NODE="2") == by_gpu
    by_flag = ["--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=1"]
    assert flags(SLURM_GPUS_ON_NODE="2", SLURM_NTASKS_PER_NODE="4") == by_flag
    assert flags(SLURM_CPUS_PER_TASK="5")[-1] == "--cpus-per-task=5"


@pytest.mark.parametrize("boot", ["0", "1.5"], ids=["running", "still starting"])
def test_usr1_saves_and_queues_again(site: Site, boot: str) -> None:
    process = site.start("run.dir=out", MODE="wait", BOOT=boot)
    run, deadline = site.root / "out", time.monotonic() + 30
    awaited = run / "READY" if boot == "0" else run
    while not awaited.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    try:
        log, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "trainer ended with 85 after USR1" in log
    assert site.noted("requeued") == ["17"]
    assert not psutil.pid_exists(process.pid)


def test_a_stop_is_told_by_its_code(site: Site) -> None:
    assert site.run("run.dir=out", MODE="fail", CODE=str(STOPPED))[0] == -signal.SIGTERM
    assert site.noted("requeued") == ["17"]
    assert not (site.root / "out/CRASHES").exists()


def test_old_wishes_do_not_reach_a_new_attempt(site: Site) -> None:
    out = site.root / "out"
    out.mkdir()
    for name in ("PREEMPT", "REQUEUE", "EXIT"):
        (out / name).write_text("9\n")
    code, log = site.run("run.dir=out")
    assert code == 0, log
    assert site.noted("requeued") == []
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("code", [64, 65, 66, 70])
def test_what_would_fail_again_is_not_queued_again(site: Site, code: int) -> None:
    assert site.run("run.dir=out", MODE="fail", CODE=str(code))[0] == code
    assert site.noted("requeued") == []


def test_the_first_exit_code_counts_and_not_that_of_killed_peers(site: Site) -> None:
    # srun reports the highest code, and its own TERM gives the peers 143.
    assert site.run("run.dir=out", MODE="fail", CODE="64", SRUN_CODE="143")[0] == 64
    assert site.noted("requeued") == []


def test_crashes_are_queued_again_but_not_for_ever(site: Site) -> None:
    for _ in range(2):
        assert site.run("run.dir=out", MODE="fail", CODE="1", WEFT_MAX_CRASHES="2")[0] == -signal.SIGTERM
    code, log = site.run("run.dir=out", MODE="fail", CODE="1", WEFT_MAX_CRASHES="2")
    assert code == 1
    assert "2 crashes in a row" in log
    assert len(site.noted("requeued")) == 2


def test_progress_forgives_crashes(site: Site) -> None:
    site.run("run.dir=out", MODE="fail", CODE="1", WEFT_MAX_CRASHES="1")
    site.run("run.dir=out", MODE="more")
    assert site.run("run.dir=out", MODE="fail", CODE="1", WEFT_MAX_CRASHES="1")[0] == -signal.SIGTERM
    assert len(site.noted("requeued")) == 3


def test_full_storage_is_tried_again_ever_later(site: Site) -> None:
    for _ in range(3):
        site.run("run.dir=out", MODE="fail", CODE="74")
    assert [wait for wait in site.noted("slept") if wait in ("30", "60", "120")] == ["30", "60", "120"]
    assert len(site.noted("requeued")) == 3


def test_restarts_are_bounded(site: Site) -> None:
    code, log = site.run("run.dir=out", MODE="more", SLURM_RESTART_COUNT="4", WEFT_MAX_RESTARTS="4")
    assert code == STOPPED
    assert "4 restarts are used up" in log
    assert site.noted("requeued") == []


def test_term_is_final(site: Site) -> None:
    process = site.start("run.dir=out", MODE="wait")
    deadline = time.monotonic() + 30
    while not (site.root / "out/READY").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    (site.root / "out/PREEMPT").touch()  # SLURM tells the trainer itself; the stand-in listens to this
    log, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, log
    assert "trainer ended with 85 after TERM" in log
    assert site.noted("requeued") == []


def test_a_job_from_elsewhere_says_where_it_belongs(site: Site, tmp_path: Path) -> None:
    code, log = site.run(SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 64
    assert "submit from the repository root" in log
