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
    """The environment in which SLURM's commands speak to a cluster of two nodes with one CPU each."""
    is_installed = all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("slurmctld", "munged"))
    if not is_installed and (shutil.which("apt-get") is None or os.geteuid() != 0):
        pytest.skip("SLURM is not installed here, and only root on Debian may install it")
    # Not below pytest's own directories: the path of a socket may have 107 characters.
    folder, port = tempfile.mkdtemp(prefix="slurm-"), free_ports(4)
    size = {"NODES": "2", "CPUS": "1", "GPUS": "0", "MEM": "4000"}
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

    def __init__(self, cluster: dict[str, str], folder: Path, name: str, overrides: list[str]) -> None:
        self.run_dir, self.log_file = folder / "runs" / name, folder / f"{name}.log"
        flags = [f"--job-name={name}", f"--output={self.log_file}", "--time=15", "--parsable", "--wait"]
        script = ["slurm/pretrain.sbatch", *overrides, f"run.dir={self.run_dir}"]
        self._process = subprocess.Popen(
            ["sbatch", *flags, *script], cwd=ROOT, env=cluster, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.job = self._process.stdout.readline().strip()

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


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_a_requeued_run_equals_an_uninterrupted_one(
    cluster: dict[str, str], recipe: list[str], tmp_path: Path
) -> None:
    straight = Submitted(cluster, tmp_path, "straight", recipe)
    assert straight.finish() == 0, straight.log
    assert "attempt 2" not in straight.log

    cut = Submitted(cluster, tmp_path, "cut", recipe)
    cut.wait_until(lambda: len(cut.metrics()) >= 3, "took three steps")
    subprocess.run(["scancel", "--signal=USR1", "--batch", cut.job], env=cluster, check=True)
    assert cut.finish() == 0, cut.log

    milestones = [
        "attempt 1: 2 nodes",
        "USR1: asking",
        "queued again: saved on request",
        "attempt 2: 2 nodes",
    ]
    offsets = [cut.log.find(milestone) for milestone in milestones]
    assert -1 not in offsets, f"{milestones[offsets.index(-1)]!r} is not in the log\n{cut.log}"
    assert offsets == sorted(offsets)
    assert "attempt 3" not in cut.log

    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cut", "straight"]
    assert not (cut.run_dir / "REQUEUE").exists()
    assert [row["step"] for row in cut.metrics()] == list(range(1, STEPS + 1))
    for expected, found in zip(straight.metrics(), cut.metrics(), strict=True):
        assert {key: found[key] for key in EXACT} == {key: expected[key] for key in EXACT}, expected["step"]
