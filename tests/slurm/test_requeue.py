"""A run that SLURM interrupts, queues again and resumes is the run that was never interrupted."""

import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 24
PACKAGES = ("conf", "kernels", "data", "model", "parallel", "train")
# In a comparison of two runs, what must agree to the last bit.
EXACT = ("loss", "grad_norm", "lr", "tokens", "samples")


def free_ports(count: int) -> int:
    """First of `count` ports in a row that nobody listens on."""
    chooser = random.SystemRandom()
    while True:
        first = chooser.randrange(30_000, 60_000)
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands speak to a cluster of three nodes with one CPU each."""
    is_installed = all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("slurmctld", "munged"))
    if not is_installed and (shutil.which("apt-get") is None or os.geteuid() != 0):
        pytest.skip("SLURM is not installed here, and only root on Debian may install it")
    # Not below pytest's own directories: the path of a socket may have 107 characters.
    folder, port = tempfile.mkdtemp(prefix="slurm-"), free_ports(5)
    size = {"NODES": "3", "CPUS": "1", "GPUS": "0", "MEM": "4000"}
    ports = {"CTLD_PORT": str(port), "NODE_PORT": str(port)}
    environment = os.environ | size | ports | {"SLURM_EMU_DIR": folder, "SLURM_CONF": f"{folder}/slurm.conf"}
    emulate = [str(ROOT / "slurm/emulate.sh")]
    try:
        subprocess.run([*emulate, "start"], env=environment, check=True, timeout=300)
        yield environment
    finally:
        subprocess.run([*emulate, "stop"], env=environment, check=True, timeout=120)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run that is small in every way, its data prepared."""
    folder = tmp_path_factory.mktemp("data")
    overrides = [
        "recipe=smoke",
        f"data.directory={folder / 'tokens'}",
        f"data.corpora.stdlib.source={Path(asyncio.__file__).parent}",
        "data.tokenizer.vocab_size=512",
        "model.vocab_size=512",
        "model.width=64",
        "data.sequence_length=64",
        "data.held_out=0.2",
    ]
    subprocess.run([sys.executable, "-m", "data.prepare", *overrides], cwd=ROOT, check=True, timeout=300)
    return [*overrides, f"train.steps={STEPS}", "sample.tokens=8"]


class Submitted:
    """A job in the queue, its log, and its run directory."""

    def __init__(self, cluster: dict[str, str], run_dir: Path, command: list[str], tree: Path) -> None:
        self.run_dir, self.log_file = run_dir, run_dir.parent / f"{run_dir.name}.log"
        flags = [f"--output={self.log_file}", "--parsable", "--wait"]
        words = [*command[:1], *flags, *command[1:]] if command[0] == "sbatch" else [*command, *flags]
        run_dir.parent.mkdir(exist_ok=True)
        self._process = subprocess.Popen(words, cwd=tree, env=cluster, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        # slurm.submit says what it does before sbatch says the number.
        self.job = next((line.strip() for line in self._process.stdout if line.strip().isdecimal()), "")

    @property
    def log(self) -> str:
        """What the job has said so far."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of its metrics so far."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if "loss" in row]

    def wait_until(self, is_true: Callable[[], bool], what: str) -> None:
        """Returns once `is_true`; fails with the log when the job ends or three minutes pass before."""
        deadline = time.monotonic() + 180
        while not is_true():
            is_over = self._process.poll() is not None or time.monotonic() > deadline
            assert not is_over, f"job {self.job}: never {what}\n{self.log}"
            time.sleep(0.1)

    def finish(self) -> int:
        """Exit code of the job, over all its attempts."""
        with self._process:
            return self._process.wait(timeout=300)


def copied_tree(root: Path) -> Path:
    """This repository once more, which may be broken."""
    for package in (*PACKAGES, "slurm"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "*.out"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / ".venv").symlink_to(ROOT / ".venv")
    return root


def in_order(log: str, milestones: list[str]) -> None:
    """Each of these stands in the log, one after the other."""
    offset = 0
    for milestone in milestones:
        offset = log.find(milestone, offset)
        assert offset != -1, f"{milestone!r} is not in the log, or not in this order\n{log}"


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_a_requeued_run_equals_an_uninterrupted_one(
    cluster: dict[str, str], recipe: list[str], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    by_hand = ["sbatch", "--time=15", "slurm/pretrain.sbatch", *recipe, f"run.dir={runs}/${{oc.env:KIND}}"]
    straight = Submitted(cluster | {"KIND": "straight"}, runs / "straight", by_hand, ROOT)
    assert straight.finish() == 0, straight.log
    assert "attempt 2" not in straight.log

    # A directory that only the composed config knows, and a repository that changes behind the job.
    tree = copied_tree(tmp_path / "tree")
    two_nodes = ["cluster.nodes=2", "cluster.device=cpu", "slurm.time=0:15:00", "slurm.memory=0"]
    submit = [
        sys.executable,
        "-m",
        "slurm.submit",
        *recipe,
        *two_nodes,
        f"run.dir='{runs}/größe ${{model.depth}}'",
    ]
    cut = Submitted(cluster, runs / "größe 4", submit, tree)
    cut.wait_until(lambda: len(cut.metrics()) >= 3, "took three steps")
    (tree / "train/__main__.py").write_text("raise SystemExit(64)\n")
    subprocess.run(["scancel", "--signal=USR1", "--batch", cut.job], env=cluster, check=True)
    assert cut.finish() == 0, cut.log

    milestones = [
        "attempt 1: 2 nodes",
        "USR1: asking",
        "queued again: saved on request",
        "attempt 2: 2 nodes",
    ]
    in_order(cut.log, milestones)
    assert "attempt 3" not in cut.log
    assert "env NCCL_IB_TIMEOUT=22" in cut.log

    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["größe 4", "straight"]
    assert not (cut.run_dir / "REQUEUE").exists()
    # Steps of well below a second and a minute's margin.
    assert 60 < int((cut.run_dir / "NOTICE").read_text()) < 600
    assert [row["step"] for row in cut.metrics()] == list(range(1, STEPS + 1))
    for expected, found in zip(straight.metrics(), cut.metrics(), strict=True):
        assert {key: found[key] for key in EXACT} == {key: expected[key] for key in EXACT}, expected["step"]


# First it waits to be asked to save; then a task is killed while the other hangs; then all is done.
TRAINER = """
import os, signal, sys, time
attempt, rank = int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ["SLURM_PROCID"]
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
print("BEGIN", flush=True)
while attempt == 0 and not heard:
    time.sleep(0.1)
if attempt == 1 and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 1:
    time.sleep(30)
    print("LEFT ALONE", flush=True)
    time.sleep(600)
sys.exit(85 if heard else 0)
"""


@pytest.mark.prove
@pytest.mark.timeout(600)
def test_slurm_does_what_the_directives_say(cluster: dict[str, str], tmp_path: Path) -> None:
    tree, run_dir = copied_tree(tmp_path / "tree"), tmp_path / "runs/one"
    (tree / "train/__main__.py").write_text(TRAINER)
    # The whole limit lies within the notice: SLURM asks when it looks for the first time.
    job = Submitted(
        cluster, run_dir, ["sbatch", "--time=2", "slurm/pretrain.sbatch", f"run.dir={run_dir}"], tree
    )
    try:
        assert job.finish() == 0, job.log
    finally:
        subprocess.run(["scancel", job.job], env=cluster, check=False)
    milestones = [
        "attempt 1: 2 nodes n[1-2]",
        # Of the shell, which --signal=B: tells alone.
        "USR1: asking the trainer to save",
        "trainer ended with 85 after USR1",
        "queued again: saved on request",
        "attempt 2: 2 nodes n[1-2]",
        # The other task would wait for ever.
        "trainer ended with 137",
        "queued again: trainer ended with 137, crash 1 of at most 3",
        "leaves out n2 from now on",
        "attempt 3: 2 nodes n[1,3]",
        "trainer ended with 0",
    ]
    in_order(job.log, milestones)
    assert "LEFT ALONE" not in job.log
