"""A rank that hangs, in each section of a run and on each axis: the others name it, and all end."""

import re
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import Corpus
from tests.train.runs import free_port, spawn, train_here

pytestmark = [pytest.mark.prove]

DEADLINE = 24  # seconds; ranks wait 12 of them for each other, which a busy machine must not take by itself
SPARE = 20  # seconds beside it, on a machine that is busy
START = 90  # seconds until the rank hangs
STEP = 3
# What hangs, and in which section that is. Each axis is cut in one of the layouts.
SECTIONS = {
    "set-up": "set-up of step 0",
    "data": f"training of step {STEP}",
    "forward": f"training of step {STEP}",
    "backward": f"training of step {STEP}",
    "update": f"training of step {STEP}",
    "evaluation": f"evaluation of step {STEP - 1}",
    "save": f"save of step {STEP - 1}",
}
LAYOUTS = [
    {"tp": 2, "dp_shard": 2},
    {"cp": 2, "pp": 2},
    {"ep": 2, "dp_replicate": 2, "dp_shard": 2},
]
KEYS = (
    *("train.steps=6", "train.evaluate_every=2", "checkpoint.every=2", "train.final_rows=1"),
    *("train.global_batch=8", "train.micro_batch=2", f"parallel.timeout_seconds={DEADLINE}"),
    f"parallel.storage_timeout_seconds={DEADLINE // 2}",
)


NAMED = r"every rank is alive, but rank 3 \([a-z0-9_, ]+\), [^;:]*in (.*) for \d+ s: waits for no other rank"


def hang_in(section: str, folder: str) -> None:
    """From the given step on, this process never comes back from one of the functions of a run."""
    from data.loader import Loader
    from model.block import Block
    from train.checkpoint.store import CheckpointStore
    from train.loop import run
    from train.loop.state import TrainState

    steps = [0]

    def for_ever(*_: Any, **__: Any) -> Any:
        Path(folder, "hangs").touch()
        time.sleep(600)

    def counted(self: TrainState, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        return for_ever() if section == "update" and steps[0] == STEP else update(self, *args, **kwargs)

    def forward(self: Block, *args: Any, **kwargs: Any) -> Any:
        if section == "forward" and self.training and steps[0] == STEP - 1:
            for_ever()
        out = block(self, *args, **kwargs)
        if section == "backward" and self.training and steps[0] == STEP - 1:
            out[0].register_hook(for_ever)
        return out

    update, block = TrainState.update, Block.forward
    TrainState.update, Block.forward = counted, forward
    if section == "set-up":
        run.build_state = for_ever
    elif section == "data":
        take = Loader.prefetch

        def prefetch(self: Loader, cursor: int, rows: int) -> Any:
            # The batch of a step is asked for one step before.
            return for_ever() if steps[0] == STEP - 1 else take(self, cursor, rows)

        Loader.prefetch = prefetch
    elif section == "evaluation":
        Loader.held_out = for_ever
    elif section == "save":
        CheckpointStore._write = for_ever


def train_and_hang(overrides: list[str], rank: int, port: int, section: str, log: str) -> None:
    """One rank of four; the last one hangs."""
    if rank == 3:
        hang_in(section, str(Path(log).parent))
    train_here(overrides, rank, 4, port, "", log)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["-".join(layout) for layout in LAYOUTS])
@pytest.mark.parametrize("section", SECTIONS)
def test_the_rank_that_hangs_is_named(
    corpus: Corpus, tmp_path: Path, section: str, layout: dict[str, int]
) -> None:
    cut = [f"parallel.{axis}={degree}" for axis, degree in layout.items()]
    overrides = corpus.overrides(tmp_path / "run", *KEYS, *cut)
    port, logs = free_port(), [tmp_path / f"log.{rank}" for rank in range(4)]
    ranks = [spawn(train_and_hang, overrides, rank, port, section, str(log)) for rank, log in enumerate(logs)]
    try:
        wait_until(lambda: (tmp_path / "hangs").exists() or not ranks[3].is_alive(), START, logs)
        wait_until(lambda: not any(rank.is_alive() for rank in ranks), DEADLINE + SPARE, logs)
    finally:
        end(ranks)
    said = [log.read_text() for log in logs]
    assert [rank.exitcode for rank in ranks] == [75] * 4, said
    for text in said:
        assert "Traceback" not in text, text
        (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
        # One alone: the others wait for it, whatever group they wait in.
        assert (found := re.search(NAMED, error)), error
        assert found[1] == SECTIONS[section], error


def wait_until(is_so: Any, seconds: float, logs: list[Path]) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, [log.read_text() for log in logs if log.exists()]
        time.sleep(0.05)


def end(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        process.kill()
        process.join()
