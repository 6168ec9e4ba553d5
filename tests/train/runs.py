"""Whole training runs at a size for tests, in processes that start in a moment and may be killed."""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.architectures import SMALL
from tests.worlds import PRELOADED, Arithmetic

# Dropout draws random numbers and a bias steers the experts: what a checkpoint forgets shows in the loss.
TINY = (
    *SMALL,
    "data=text",
    "data.sequence_length=32",
    "data.tokenizer.vocab_size=400",
    "data.tokenizer.train_bytes=60000",
    "data.held_out=0.15",
    "data.workers=0",
    "model.width=16",
    "model.depth=2",
    "model.vocab_size=448",
    "layout.pattern=gdn attn",
    "moe=sigmoid",
    "moe.num_experts=4",
    "moe.bias_rate=0.05",
    "residual.dropout=0.1",
    "train.global_batch=4",
    "train.evaluate_every=10",
    "train.evaluate_rows=8",
    "train.final_rows=8",
    "optim.lr=0.01",
    "schedule.warmup_steps=3",
    "checkpoint.every=4",
    "track=disabled",
    "sample.tokens=4",
)

WORDS = (
    *("apples", "apricots", "bananas", "blackberries", "cherries", "currants", "dates", "elderberries"),
    *("figs", "grapes", "lemons", "limes", "mangoes", "melons", "nectarines", "oranges", "peaches", "pears"),
    *("plums", "quinces", "raspberries"),
)

# Fields of a metrics line that follow from the clock or the machine.
CLOCK = ("seconds", "speed/", "memory/", "data/wait_seconds")


def overrides_of(dataset: Path, tree: Path, run_dir: Path, *more: str) -> list[str]:
    """The overrides of a tiny run."""
    return [
        *TINY,
        f"data.directory={dataset}",
        f"data.corpora.documents.source={tree}",
        f"run.dir={run_dir}",
        *more,
    ]


def write_tree(root: Path) -> Path:
    """A corpus of 80 small files of arithmetic, different and learnable."""
    root.mkdir(parents=True)
    for number in range(80):
        lines = [
            f"{WORDS[a % 17]} {a} plus {WORDS[number % 19]} {number} is {a + number}\n"
            for a in range(number % 13, 40)
        ]
        (root / f"sum_{number}.txt").write_text("".join(lines))
    return root


def spawn(function: Any, *args: Any) -> BaseProcess:
    """A process that runs `function(*args)` and multiplies as this one does, its exit code the run's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=_guarded, args=(Arithmetic.of_here(), function, *args))
    process.start()
    return process


def _guarded(arithmetic: Arithmetic, function: Any, *args: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    arithmetic.take()
    function(*args)
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by spawn"
    parent.join()
    os._exit(1)


def train_here(
    overrides: Sequence[str], rank: int = 0, size: int = 1, port: int = 0, forgets: str = "", log: str = ""
) -> None:
    """One run in this process, its output in a file.

    `forgets` names what restoring a checkpoint leaves out: a sabotage.
    """
    from conf.errors import exit_on_error
    from train.__main__ import start

    file = os.open(log or log_path(overrides), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if forgets:
        forget(forgets)
    with exit_on_error():
        code = start(list(overrides))
    if code:
        sys.exit(code)


def log_path(overrides: Sequence[str]) -> Path:
    """Where the processes of a run print: beside its directory."""
    run_dir = next(text.split("=", 1)[1] for text in overrides if text.startswith("run.dir="))
    return Path(f"{run_dir}.log")


def forget(what: str) -> None:
    """Makes restoring leave out one part of the state, as if it had never been saved."""
    import torch

    from parallel.apply import Parallel
    from train.loop.state import TrainState

    if what == "twins":
        Parallel.tied_copies = lambda self: iter(())
    restore = TrainState.restore

    def sabotaged(self: TrainState, tensors: dict, counters: dict, world: Any) -> None:
        random = torch.get_rng_state()
        restore(self, tensors, counters, world)
        if what == "cursor":
            self.cursor = 0
        elif what == "random":
            torch.set_rng_state(random)
        elif what == "bias":
            for part in self.built.parts:
                for router in part.routers():
                    router.bias.zero_()
        elif what == "optimizer":
            self.optimizer.state.clear()

    TrainState.restore = sabotaged


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn_ranks(overrides: Sequence[str], size: int, forgets: str = "") -> list[BaseProcess]:
    """The processes of one run."""
    port = free_port()
    return [spawn(train_here, list(overrides), rank, size, port, forgets) for rank in range(size)]


def wait_for_metrics(run_dir: Path, ranks: Sequence[BaseProcess], timeout: float = 60) -> None:
    """Returns once the first step is done."""
    deadline = time.monotonic() + timeout
    while not (run_dir / "metrics.jsonl").exists():
        assert all(process.is_alive() for process in ranks), [process.exitcode for process in ranks]
        assert time.monotonic() < deadline, f"no step after {timeout} s"
        time.sleep(0.002)


def run_to_end(overrides: Sequence[str], size: int = 1, forgets: str = "", timeout: float = 120) -> int:
    """Exit code of a run on `size` processes; the first that is not zero."""
    ranks = spawn_ranks(overrides, size, forgets)
    deadline = time.monotonic() + timeout
    try:
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise TimeoutError(f"run still going after {timeout} s; {log_path(overrides).read_text()}")
    finally:
        for process in ranks:
            process.kill()
    return next((code for process in ranks if (code := process.exitcode)), 0)


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock decides; numbers keep every bit."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in lines]


def model_of(run_dir: Path) -> Any:
    """The model of the newest checkpoint of a run, in this process."""
    import torch

    from parallel.mesh.world import World
    from train.config.reading import open_to_read
    from train.eval.restored import restore

    config = open_to_read(str(run_dir), None, (), 1)
    return restore(str(run_dir), config, World.alone(torch.device("cpu"))).built.whole
