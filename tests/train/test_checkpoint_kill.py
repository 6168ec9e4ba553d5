"""kill -9 at random moments of a save leaves complete checkpoints and sweepable leftovers, nothing else."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import StorageError
from train.checkpoint.manifest import verify
from train.checkpoint.storage import DigestingFileSystem, DigestingStream
from train.checkpoint.store import CheckpointStore

ROOT = Path(__file__).parents[2]
KILLS = 30


class SlowStream(DigestingStream):
    """Gives every write to the system in two halves with a pause between them."""

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        written = super().write(view[:half])
        time.sleep(0.0001)
        return written + super().write(view[half:])


class SlowStore(CheckpointStore):
    def _open_file_system(self) -> DigestingFileSystem:
        fs = DigestingFileSystem()
        fs.open_stream = SlowStream
        return fs


def state_at(step: int) -> dict[str, Any]:
    return {
        "model": {f"w{index}": torch.full((64,), float(step + index)) for index in range(6)},
        "step": step,
    }


def save_forever(directory: Path) -> None:
    """Resume, then save step after step; forks a child to be killed so that torch is imported once."""
    store = SlowStore(directory, keep=2)
    state = state_at(-1)
    loaded = store.load_latest(state)
    step = 0 if loaded is None else loaded.step
    assert loaded is None or all(
        torch.equal(state["model"][name], value) for name, value in state_at(step)["model"].items()
    ), "loaded another step's tensors"
    while True:
        step += 1
        store.save(step, state_at(step), {"step": step})


@pytest.mark.slow
def test_kill_at_random_moments(tmp_path: Path) -> None:
    # A fresh interpreter forks the victims: the test process has threads, which do not survive a fork.
    script = (
        "import sys; from pathlib import Path; from tests.train.test_checkpoint_kill import kill_many; "
        "kill_many(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def kill_many(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    generator = random.Random(0)
    # Once here, so that no child spends its short life importing.
    CheckpointStore(tmp_path / "warm", keep=2).save(1, state_at(1), {})
    CheckpointStore(tmp_path / "warm", keep=2).load_latest(state_at(1))
    directory = tmp_path / "checkpoints"
    newest, interrupted = 0, 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                save_forever(directory)
            finally:
                os._exit(9)
        time.sleep(generator.uniform(0.0, 0.4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the child failed by itself: {status=}"
        names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
        unknown = [name for name in names if not re.fullmatch(r"step_\d{8}(\.tmp|\.deleting)?", name)]
        assert not unknown, unknown
        interrupted += any("." in name for name in names)
        steps = CheckpointStore(directory, keep=2).candidates()
        for step in steps:
            path = directory / f"step_{step:08d}"
            assert verify(path) == []
        assert max(steps, default=0) >= newest, "a committed checkpoint was lost"
        newest = max(steps, default=0)
    print(f"{newest=} {interrupted=}")
    assert newest > 0, "no save ever completed: the kills came too early to prove anything"
    assert interrupted > 0, "no kill came inside a save"


def limited(directory: Path) -> None:
    """Saves once, then with a file size limit below what the next one needs."""
    store = CheckpointStore(directory, keep=2)
    store.save(1, {"w": torch.zeros(8)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        store.save(2, {"w": torch.zeros(50_000)}, {})
    except StorageError as error:
        print(error)
        sys.exit(error.exit_code)


def test_a_file_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.train.test_checkpoint_kill import limited; "
        "limited(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 74, done.stdout + done.stderr
    assert "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert verify(tmp_path / "step_00000001") == []
