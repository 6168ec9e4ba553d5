"""What the batch script does after the trainer ends, against stand-ins for SLURM's own commands."""

import os
import shutil
import signal
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from conf.errors import STOPPED
from train.checkpoint.records import write_record
from train.config.load import load_config

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
  "-o show job 17") echo "JobId=17 EndTime=${JOB_END:-Unknown} ExcNodeList=${EXCLUDED:-(null)} A=b" ;;
  requeuehold*) echo "$2" >>"$FAKE/held"; kill -TERM "$PPID" ;;
  update* | release*) echo "$*" >>"$FAKE/updated" ;;
  requeue*) echo "$2" >>"$FAKE/requeued"; kill -TERM "$PPID" ;;
esac
"""
# The trainer's contract, as `python -m train` of the temporary repository; its config is the real one.
TRAINER = """
import os, pathlib, signal, sys, time

print("ARGS", sys.argv[1:], flush=True)
print("ENV", {name: os.environ.get(name) for name in os.environ.get("SHOW", "").split()}, flush=True)
mode, code = os.environ["MODE"], int(os.environ.get("CODE", "0"))
if mode == "wait":
    from train.config.load import compose_run, read_run

    run = pathlib.Path(compose_run(read_run(sys.argv[1:]))["run"]["dir"])
    time.sleep(float(os.environ.get("BOOT", "0")))
    (run / "PREEMPT").unlink(missing_ok=True)
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    (run / "READY").touch()
    while not heard and not (run / "PREEMPT").exists():
        time.sleep(0.02)
    mode = "more"
if "LOSES" in os.environ:
    (run,) = (word.removeprefix("run.dir=") for word in sys.argv if word.startswith("run.dir="))
    stacks = pathlib.Path(run, "stacks")
    stacks.mkdir(parents=True, exist_ok=True)
    (stacks / "lost_node").write_text(os.environ["LOSES"])
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(85 if mode == "more" else code)
"""
PACKAGES = ("conf", "kernels", "data", "model", "parallel", "train", "slurm")


class Site:
    """A repository with the batch script, and a SLURM that writes down what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.root, self.fake = folder / "repo", folder / "fake"
        self.fake.mkdir()
        for package in ("conf", "train", "slurm"):
            (self.root / package).mkdir(parents=True)
        for path in (
            *PACKAGES,
            *(
                f"{name}/{file.name}"
                for name in ("conf", "train", "slurm")
                for file in (ROOT / name).iterdir()
            ),
        ):
            if not (self.root / path).exists():
                (self.root / path).symlink_to(ROOT / path)
        (self.root / "train/__main__.py").unlink()
        (self.root / "train/__main__.py").write_text(TRAINER)
        (self.root / ".venv").symlink_to(ROOT / ".venv")
        # The waits of the script are written down and cut short.
        sleep = '#!/bin/sh\necho "$1" >>"$FAKE/slept"\nexec /bin/sleep 0.1\n'
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", sleep)):
            (self.fake / name).write_text(text)
            (self.fake / name).chmod(0o755)

    def start(self, *arguments: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
        """The batch script as the batch step starts it, from a shell that did `before`."""
        slurm = {
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "6",
        }
        path = {"PATH": f"{self.fake}:{os.environ['PATH']}", "FAKE": str(self.fake)}
        return subprocess.Popen(
            ["bash", "-c", before + 'exec "$0" "$@"', str(self.root / "slurm/pretrain.sbatch"), *arguments],
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


@pytest.mark.parametrize("name", ["x y", None])
def test_attempts_of_a_job_by_hand_have_one_log_in_the_run_directory(site: Site, name: str | None) -> None:
    outputs = site.root / "slurm", site.root / "a b/logs"
    file = f"{name or 'weft'}-17.out"
    given = {"SLURM_JOB_NAME": name} if name else {}
    for restarts in ("0", "1"):
        # As slurmd opens it, by --open-mode=append.
        redirect = f"exec >>'{outputs[0] / file}' 2>&1; "
        process = site.start("run.dir='a b'", before=redirect, SLURM_RESTART_COUNT=restarts, **given)
        assert process.communicate(timeout=60) == ("", None)
        assert process.returncode == 0
    attempts = [line for line in (outputs[1] / file).read_text().splitlines() if " attempt " in line]
    assert [f"attempt {number}:" in line for number, line in enumerate(attempts, 1)] == [True, True]
    assert (outputs[1] / file).read_text().count("ARGS") == 2
    assert (outputs[0] / file).read_text().count(f"log of job 17: a b/logs/{file}\n") == 2
    assert "ARGS" not in (outputs[0] / file).read_text()


def test_an_output_that_somebody_chose_stays(site: Site, tmp_path: Path) -> None:
    process = site.start("run.dir=out", before=f"exec >>'{tmp_path}/mine-17.out' 2>&1; ")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert "ARGS" in (tmp_path / "mine-17.out").read_text()
    assert not (site.root / "out/logs").exists()


def test_a_finished_run_ends_with_zero(site: Site) -> None:
    code, log = site.run("run.dir=out")
    assert code == 0, log
    assert site.noted("requeued") == []


def test_arguments_reach_the_trainer_unchanged(site: Site) -> None:
    tokens = ["layout.pattern='3*gdn attn'", 'sample.prompt="x  y; $(reboot) *"', "track.entity="]
    code, log = site.run(*tokens)
    assert code == 0, log
    assert f"ARGS {['run.name=slurm-17', *tokens]}" in log
    assert (site.root / "runs/slurm-17").is_dir()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["run.dir=runs/x_${model.depth}", "model.depth=3"], "runs/x_3"),
        (["run.dir='runs/a b'"], "runs/a b"),
        (["run.dir=runs/größe_${oc.env:SOMEBODY}"], "runs/größe_me"),
        (["run={dir: runs/mapping}"], "runs/mapping"),
        (["recipe=elsewhere"], "runs/of_recipe_4"),
        # A prefix that only looks like the key, and a later one that wins.
        (["run.dir=runs/first", "sample.prompt='run.dir=runs/second'", "++run.dir=runs/last"], "runs/last"),
    ],
    ids=["reference", "quotes", "environment", "mapping", "recipe", "last"],
)
def test_the_directory_is_that_of_the_composed_config(
    site: Site, overrides: list[str], expected: str
) -> None:
    recipes = site.root / "conf/recipe"
    recipes.unlink()
    shutil.copytree(ROOT / "conf/recipe", recipes)
    text = "# @package _global_\n# A run elsewhere.\nrun:\n  dir: runs/of_recipe_${model.depth}\n"
    (recipes / "elsewhere.yaml").write_text(text)
    # In the locale of a bare batch node.
    code, log = site.run(*overrides, MODE="fail", CODE="1", SOMEBODY="me", LC_ALL="C")
    assert code == -signal.SIGTERM, log
    assert [path for path in site.root.glob("runs/*") if path.is_dir()] == [site.root / expected]
    assert (site.root / expected / "CRASHES").read_text() == "1 \n"


def test_one_run_directory_for_every_attempt_of_a_job(site: Site) -> None:
    for attempt, job in enumerate(("17", "17")):
        site.run(MODE="more", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=str(attempt))
    site.run(SLURM_JOB_ID="21", SLURM_ARRAY_JOB_ID="20", SLURM_ARRAY_TASK_ID="3")
    assert sorted(path.name for path in site.root.glob("runs/*")) == ["slurm-17", "slurm-20_3"]


@pytest.mark.parametrize("wrong", ["run.dri=out", "-m", "slurm.container.kind=pyxis", "run.dir=a\nb"])
def test_a_config_that_cannot_run_ends_the_job_before_srun(site: Site, wrong: str) -> None:
    code, log = site.run("run.dir=out", wrong)
    assert code == 64, log
    assert log.count("error: ") == 1
    assert site.noted("srun.arguments") == site.noted("requeued") == []


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
    run, deadline = site.root / "out", time.monotonic() + 60
    awaited = run / "READY" if boot == "0" else site.fake / "srun.arguments"
    while not awaited.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    try:
        log, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "trainer ended with 85 after USR1" in log
    assert site.noted("requeued") == ["17"]
    assert not psutil.pid_exists(process.pid)


@pytest.mark.parametrize(("name", "requeued"), [("USR1", ["17"]), ("TERM", [])])
def test_a_signal_before_the_trainer_starts_is_heard(
    site: Site, tmp_path: Path, name: str, requeued: list[str]
) -> None:
    (tmp_path / "prolog.sh").write_text(f"kill -{name} $$\n")
    code, log = site.run("run.dir=out", f"slurm.prolog={tmp_path}/prolog.sh", MODE="wait")
    assert site.noted("srun.arguments") == []
    assert site.noted("requeued") == requeued, log
    assert code == (-signal.SIGTERM if requeued else 128 + signal.SIGTERM)


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


def test_one_who_interrupts_by_hand_ends_the_job(site: Site) -> None:
    assert site.run("run.dir=out", MODE="fail", CODE="130")[0] == 130
    assert site.noted("requeued") == []
    assert not (site.root / "out/CRASHES").exists()


@pytest.mark.parametrize("code", [64, 65, 66, 70])
def test_what_would_fail_again_is_not_queued_again(site: Site, code: int) -> None:
    assert site.run("run.dir=out", MODE="fail", CODE=str(code))[0] == code
    assert site.noted("requeued") == []


def test_the_first_exit_code_counts_and_not_that_of_killed_peers(site: Site) -> None:
    # srun reports the highest code, and its own TERM gives the peers 143.
    assert site.run("run.dir=out", MODE="fail", CODE="64", SRUN_CODE="143")[0] == 64
    assert site.noted("requeued") == []


def test_crashes_are_queued_again_but_not_for_ever(site: Site) -> None:
    crash = ("run.dir=out", "slurm.max_crashes=2")
    for _ in range(2):
        assert site.run(*crash, MODE="fail", CODE="1")[0] == -signal.SIGTERM
    code, log = site.run(*crash, MODE="fail", CODE="1")
    assert code == 1
    assert "3 crashes without a new checkpoint" in log
    assert len(site.noted("requeued")) == 2


def test_a_new_checkpoint_forgives_crashes(site: Site) -> None:
    crash = ("run.dir=out", "slurm.max_crashes=1")
    checkpoints = site.root / "out/checkpoints"
    checkpoints.mkdir(parents=True)
    # Checkpoints without a config beside them are no run's.
    write_record(site.root / "out/config.json", load_config(["run.dir=out"], 1).model_dump(mode="json"))
    for step in (100, 200, 1000):
        (checkpoints / f"step_{step:08d}").mkdir()
        assert site.run(*crash, MODE="fail", CODE="1")[0] == -signal.SIGTERM
    # A save that was cut off, and a damaged one, are none.
    for name in ("step_00001100.tmp", "step_00001100.corrupt"):
        (checkpoints / name).mkdir()
    assert site.run(*crash, MODE="fail", CODE="1")[0] == 1


def test_a_stop_on_request_forgives_crashes(site: Site) -> None:
    crash = ("run.dir=out", "slurm.max_crashes=1")
    site.run(*crash, MODE="fail", CODE="1")
    site.run(*crash, MODE="more")
    assert site.run(*crash, MODE="fail", CODE="1")[0] == -signal.SIGTERM
    assert len(site.noted("requeued")) == 3


def test_a_node_whose_task_was_killed_is_left_out(site: Site) -> None:
    killed = {"MODE": "killed", "SLURMD_NODENAME": "n2"}
    log = site.run("run.dir=out", EXCLUDED="n7", **killed)[1]
    assert "leaves out n2" in log
    assert site.noted("held") == ["17"]
    assert site.noted("updated") == ["update JobId=17 ExcNodeList=n7,n2", "release 17"]
    # An exception names no node, nor does one who gave up on another.
    for code in ("1", "75"):
        site.run("run.dir=other", MODE="fail", CODE=code, SLURMD_NODENAME="n2")
    site.run("run.dir=third", "slurm.exclude_failed=false", **killed)
    assert site.noted("held") == ["17"]
    assert len(site.noted("requeued")) == 3


def test_a_node_that_hung_is_left_out(site: Site) -> None:
    # What the ranks that gave up on it have left.
    (site.root / "out/stacks").mkdir(parents=True)
    lost = site.root / "out/stacks/lost_node"
    lost.write_text("n1\n")
    failed = {"MODE": "fail", "CODE": "75", "SLURMD_NODENAME": "n2"}
    site.run("run.dir=out", **failed)
    # That was of an attempt before.
    assert site.noted("updated") == []
    log = site.run("run.dir=out", LOSES="n1", **failed)[1]
    assert "leaves out n1" in log
    assert site.noted("updated") == ["update JobId=17 ExcNodeList=n1", "release 17"]
    site.run("run.dir=other", "slurm.exclude_failed=false", LOSES="n1", **failed)
    assert site.noted("held") == ["17"]


def test_full_storage_is_tried_again_ever_later(site: Site) -> None:
    for _ in range(3):
        site.run("run.dir=out", MODE="fail", CODE="74")
    assert [wait for wait in site.noted("slept") if wait in ("30", "60", "120")] == ["30", "60", "120"]
    assert len(site.noted("requeued")) == 3


def test_restarts_are_bounded(site: Site) -> None:
    code, log = site.run("run.dir=out", "slurm.max_restarts=4", MODE="more", SLURM_RESTART_COUNT="4")
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


def test_what_takes_longer_than_slurms_notice_is_asked_for_earlier(site: Site) -> None:
    (site.root / "out").mkdir()
    (site.root / "out/NOTICE").write_text("500\n")
    end = datetime.now() + timedelta(seconds=2000)
    for overrides, least in (((), 1500), (("slurm.notice_seconds=900",), 1100)):
        (site.fake / "slept").unlink(missing_ok=True)
        log = site.run("run.dir=out", *overrides, MODE="wait", JOB_END=end.isoformat(timespec="seconds"))[1]
        assert "trainer ended with 85 after USR1" in log
        (first,) = [int(wait) for wait in site.noted("slept") if int(wait) > 300]
        assert least - 200 <= first <= least
    # Less than what SLURM itself gives is left to it.
    (site.root / "out/NOTICE").write_text("90\n")
    assert (
        "before the time limit" not in site.run("run.dir=out", JOB_END=end.isoformat(timespec="seconds"))[1]
    )


def test_hooks_change_the_environment_of_the_trainer(site: Site, tmp_path: Path) -> None:
    prolog = tmp_path / "site prolog.sh"
    prolog.write_text("export OF_PROLOG=$UNSET-$NCCL_DEBUG LOADED\n")
    module = 'module() { echo "$*" >>"$FAKE/modules"; LOADED="$2 $3"; }; export -f module; '
    keys = [
        f"slurm.prolog='{prolog}'",
        "slurm.modules=[cuda/13.0, nccl]",
        "slurm.env.NCCL_DEBUG=INFO",
        "slurm.env.OTHER='a  b'",
        "slurm.env.NCCL_IB_TIMEOUT=null",
    ]
    names = "OF_PROLOG LOADED OTHER NCCL_IB_TIMEOUT PYTORCH_CUDA_ALLOC_CONF"
    process = site.start("run.dir=out", *keys, SHOW=names, NCCL_IB_TIMEOUT="1", before=module)
    log, _ = process.communicate(timeout=60)
    shown = {
        "OF_PROLOG": "-INFO",
        "LOADED": "cuda/13.0 nccl",
        "OTHER": "a  b",
        "NCCL_IB_TIMEOUT": None,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    assert f"ENV {shown}" in log
    for said in ("env OTHER=a  b", "env NCCL_IB_TIMEOUT is not set", "env NCCL_IB_RETRY_CNT=7"):
        assert said in log
    code, log = site.run("run.dir=out", "slurm.prolog=/nowhere.sh")
    assert (code, "slurm.prolog: cannot read /nowhere.sh" in log) == (64, True)


def test_containers_surround_the_trainer_and_nothing_else(site: Site) -> None:
    apptainer = '#!/bin/sh\nprintf "%s\\n" "$@" >"$FAKE/apptainer"\nshift 7\nexec "$@"\n'
    (site.fake / "apptainer").write_text(apptainer)
    (site.fake / "apptainer").chmod(0o755)
    python = f"slurm.container.python={ROOT}/.venv/bin/python"
    keys = [python, "slurm.container.image='/images/a b.sif'", "slurm.container.mounts=[/opt:/opt:ro]"]
    run, data = site.root.parent / "out", site.root.parent / "tokens"
    paths = [f"run.dir={run}", f"data.directory={data}"]
    mounts = ",".join([*(f"{path}:{path}" for path in (site.root, run, data)), "/opt:/opt:ro"])
    code, log = site.run(*paths, *keys, "slurm.container.kind=apptainer")
    assert code == 0, log
    words = ["exec", "--nv", "--bind", mounts, "--pwd", str(site.root), "/images/a b.sif"]
    assert site.noted("apptainer")[: len(words) + 3] == [*words, f"{ROOT}/.venv/bin/python", "-m", "train"]
    code, log = site.run(*paths, *keys, "slurm.container.kind=pyxis")
    assert code == 0, log
    flags = [flag for flag in site.noted("srun.arguments") if flag.startswith("--container")]
    image, workdir = "--container-image=/images/a b.sif", f"--container-workdir={site.root}"
    assert flags == [image, f"--container-mounts={mounts}", workdir]
