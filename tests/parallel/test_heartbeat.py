"""Processes that never come, end or hang: those that are left name them, in time, and end."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from parallel.config.degrees import Degrees
from parallel.mesh.progress import waits_for
from tests.train.runs import free_port, spawn
from tests.worlds import run_world

DEADLINE = 8  # seconds; ranks wait half of it for each other
LATE = 2 * DEADLINE
SPARE = 30  # seconds beside it: to start, to find out who it was, on a machine that is busy


def work(rank: int, size: int, port: int, cut: dict[str, int], folder: str, steps: int, name: str) -> None:
    """Sums over all ranks and along tp, again and again; counts the sums in a file.

    Rank 1 breaks or hangs once there is a file of that name.
    """
    import torch
    import torch.distributed as dist

    from conf.errors import exit_on_error
    from parallel.config.parallel import ParallelConfig
    from parallel.config.rendezvous import Rendezvous
    from parallel.mesh.world import open_world
    from train.checkpoint.ranks import Ranks

    file = os.open(f"{folder}/log.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    keys = {"data": "fsdp", "dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1, "ep": 1, "pp": 1} | cut
    keys |= {"pp_schedule": "1f1b", "pp_chunks": None, "pp_layout": None, "recompute": "none"}
    keys |= {
        "compile": False,
        "ep_dispatch": "all_to_all",
        "offload": "none",
        "reshard_after_forward": True,
        "prefetch": 0,
        "timeout_seconds": DEADLINE,
        "storage_timeout_seconds": 60,
    }
    keys |= {"zero": {"stage": 2, "offload": "none", "whole_below": 0}}
    config = ParallelConfig(**keys)
    rendezvous = Rendezvous("127.0.0.1", port, is_hosted=False, host=f"node{rank}")
    record = Path(folder) / "stacks"
    with exit_on_error(), open_world(config, rank, size, rank, rendezvous, None, record) as world:
        for step in range(steps):
            world.progress.enter("counting", step)
            world.sum(torch.ones(4))
            Path(f"{folder}/steps.{name}").write_text(str(step))
            if Path(f"{folder}/break").exists() and rank == 1:
                raise ValueError("broken here")
            if Path(f"{folder}/hang").exists() and rank == 1:
                time.sleep(600)
            if Path(f"{folder}/hang").exists() and rank > 1:
                # Not so long that rank 0 gives up later than they do, nor that they are not waiting by then.
                time.sleep(3.5)
            if Path(f"{folder}/slow disk").exists():
                world.progress.enter("save", step)
                slowly = partial(time.sleep, LATE if rank == 1 else 0)
                Ranks(rank, size, world.storage).together("not saved", slowly)
                Path(f"{folder}/saved.{name}").touch()
                return
            if world.axes.tp.group is not None:
                dist.all_reduce(torch.ones(4), group=world.axes.tp.group)
            time.sleep(0.02)


class Ranks:
    """Processes of one world, each with a log of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: dict[str, BaseProcess] = {}

    def start(self, rank: int, size: int, name: str = "", steps: int = 10_000, **cut: int) -> None:
        name = name or str(rank)
        self.processes[name] = spawn(work, rank, size, self.port, cut, str(self.folder), steps, name)

    def wait_until_all_work(self) -> None:
        deadline = time.monotonic() + SPARE
        while not all((self.folder / f"steps.{name}").exists() for name in self.processes):
            assert time.monotonic() < deadline, [self.said(name) for name in self.processes]
            time.sleep(0.01)

    def said(self, name: str) -> str:
        path = self.folder / f"log.{name}"
        return path.read_text() if path.exists() else ""

    def error(self, name: str) -> str:
        lines = [line for line in self.said(name).splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.said(name), self.said(name)
        assert len(lines) == 1, self.said(name)
        return lines[0]

    def exit_code(self, name: str, seconds: float = DEADLINE + SPARE) -> int | None:
        self.processes[name].join(seconds)
        return self.processes[name].exitcode


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    found = Ranks(tmp_path)
    yield found
    for process in found.processes.values():
        process.kill()
        process.join()


@pytest.mark.parametrize(("present", "says"), [(0, "1 of 2 ranks did not come"), (1, "rank 0 did not open")])
def test_a_rank_that_never_comes_is_named(ranks: Ranks, present: int, says: str) -> None:
    ranks.start(present, 2)
    assert ranks.exit_code(str(present)) == 75
    said = ranks.error(str(present))
    assert says in said
    assert f"127.0.0.1:{ranks.port} within {DEADLINE} s" in said
    if present == 0:
        assert "rank 1;" in said


def test_those_who_came_all_name_the_absent(ranks: Ranks) -> None:
    for rank in (0, 2):
        ranks.start(rank, 4)
    for name in ("0", "2"):
        assert ranks.exit_code(name) == 75
        assert "2 of 4 ranks did not come" in ranks.error(name)
        assert "rank 1, 3;" in ranks.error(name)


def test_processes_of_two_sizes_are_refused(ranks: Ranks) -> None:
    ranks.start(0, 2)
    ranks.start(1, 3)
    for name in ("0", "1"):
        assert ranks.exit_code(name) == 64
        assert "WORLD_SIZE" in ranks.error(name)
        assert "rank 0 as one of 2, rank 1 as one of 3" in ranks.error(name)


def test_a_rank_that_is_there_twice_is_refused(ranks: Ranks) -> None:
    for name in ("first", "second"):
        ranks.start(1, 2, name, steps=150)  # long enough for the second to meet the first at work
    ranks.start(0, 2, steps=150)
    codes = {name: ranks.exit_code(name) for name in ("first", "second")}
    assert sorted(codes.values(), key=str) == [0, 64]
    refused = next(name for name, code in codes.items() if code == 64)
    assert "both say that they are rank 1" in ranks.error(refused)
    assert ranks.exit_code("0") == 0


def test_a_port_that_stays_taken_is_named(ranks: Ranks) -> None:
    with socket.socket(socket.AF_INET6) as owner:
        owner.bind(("::", ranks.port))
        owner.listen()
        ranks.start(0, 2)
        assert ranks.exit_code("0") == 75
    assert "MASTER_PORT" in ranks.error("0")
    assert f"127.0.0.1:{ranks.port}" in ranks.error("0")


@pytest.mark.parametrize("victim", [0, pytest.param(3, marks=pytest.mark.prove)])
@pytest.mark.parametrize(
    ("number", "what"),
    [
        # Rank 0 keeps the store: without it there is nobody to ask.
        (signal.SIGKILL, ("the connection to it is lost", "ended without a word")),
        (signal.SIGSTOP, ("hangs",)),
    ],
    ids=["killed", "stopped"],
)
def test_every_rank_that_is_left_names_the_lost_one(
    ranks: Ranks, victim: int, number: int, what: tuple[str, ...]
) -> None:
    for rank in range(4):
        ranks.start(rank, 4, cp=2, tp=2)
    ranks.wait_until_all_work()
    os.kill(ranks.processes[str(victim)].pid or 0, number)
    since = time.monotonic()
    for rank in {0, 1, 2, 3} - {victim}:
        assert ranks.exit_code(str(rank)) == 75, ranks.said(str(rank))
        said = ranks.error(str(rank))
        assert f"rank {victim} (cp {victim // 2}, tp {victim % 2})" in said, said
        assert any(text in said for text in what), said
    assert (ranks.folder / "stacks" / "lost_node").read_text() == f"node{victim}\n"
    assert time.monotonic() - since < DEADLINE + SPARE


def test_an_error_of_one_rank_is_told_by_the_others(ranks: Ranks, tmp_path: Path) -> None:
    for rank in range(3):
        ranks.start(rank, 3)
    ranks.wait_until_all_work()
    (tmp_path / "break").touch()
    for name in ("0", "2"):
        assert ranks.exit_code(name) == 75, ranks.said(name)
        assert "rank 1 (dp_shard 1)" in ranks.error(name)
        assert "failed: ValueError: broken here" in ranks.error(name)
    assert ranks.exit_code("1") not in (0, 75)
    assert 'raise ValueError("broken here")' in ranks.said("1")
    # Its machine is not to blame.
    assert not (tmp_path / "stacks" / "lost_node").exists()


def test_a_rank_that_hangs_in_its_own_work_is_named(ranks: Ranks, tmp_path: Path) -> None:
    for rank in range(2):
        ranks.start(rank, 2, tp=2)
    ranks.wait_until_all_work()
    (tmp_path / "hang").touch()
    # Its heart beats on, and rank 0 waits in a group below the world.
    assert ranks.exit_code("0") == 75, ranks.said("0")
    assert re.search(
        r"every rank is alive, but rank 1 \(tp 1\), .*, in counting of step \d+ for \d+ s: waits for no "
        r"other rank, and rank 0 waited in vain",
        ranks.error("0"),
    )
    assert ranks.exit_code("1") == 75, ranks.said("1")
    for rank in range(2):
        stacks = tmp_path / "stacks" / f"rank_{rank}.stacks"
        assert str(stacks) in ranks.error(str(rank))
        record = json.loads(stacks.with_suffix(".collectives.json").read_text())
        assert record["entries"][-1]["profiling_name"] == "gloo:all_reduce"
    assert (tmp_path / "stacks" / "lost_node").read_text() == "node1\n"
    # The line that hangs.
    assert re.search(r"test_heartbeat\.py\", line \d+ in work", stacks.read_text())


def test_those_that_have_not_given_up_yet_are_not_named(ranks: Ranks, tmp_path: Path) -> None:
    for rank in range(4):
        ranks.start(rank, 4, cp=2, tp=2)
    ranks.wait_until_all_work()
    (tmp_path / "hang").touch()
    # Rank 0 gives up first, on its group of tp. The other group waits for all, and still does so.
    for rank in range(4):
        assert ranks.exit_code(str(rank)) == 75, ranks.said(str(rank))
        said = ranks.error(str(rank))
        assert "every rank is alive, but rank 1 (cp 0, tp 1)" in said
        assert re.search(r"waits for no other rank, and rank 0[, 23]* waited in vain", said), said
        assert "rank 2 (" not in said


def test_a_disk_that_hangs_does_not_keep_a_lost_rank_secret(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    for rank in range(2):
        # Nobody reads it: to open it for writing waits for ever.
        os.mkfifo(tmp_path / "stacks" / f"rank_{rank}.stacks")
        ranks.start(rank, 2, tp=2)
    ranks.wait_until_all_work()
    (tmp_path / "hang").touch()
    for rank in range(2):
        assert ranks.exit_code(str(rank)) == 75, ranks.said(str(rank))
        assert "every rank is alive, but rank 1 (tp 1)" in ranks.error(str(rank))


def test_a_late_save_of_one_rank_is_waited_for(ranks: Ranks, tmp_path: Path) -> None:
    for rank in range(2):
        ranks.start(rank, 2, tp=2)
    ranks.wait_until_all_work()
    (tmp_path / "slow disk").touch()
    for rank in range(2):
        # Longer than a collective of a step may take, and than it takes to name a lost rank.
        assert ranks.exit_code(str(rank), LATE + SPARE) == 0, ranks.said(str(rank))
        assert (tmp_path / f"saved.{rank}").exists()


def test_ranks_that_are_done_end_well(ranks: Ranks) -> None:
    for rank in range(3):
        ranks.start(rank, 3, steps=5)
    for rank in range(3):
        assert ranks.exit_code(str(rank)) == 0, ranks.said(str(rank))
        assert not ranks.said(str(rank))


def seen_waiting(rank: int, size: int, how: str) -> str | None:
    """What rank 1 says that it waits for while rank 0 lets it wait."""
    import torch
    import torch.distributed as dist

    from parallel.mesh.axes import open_axes
    from parallel.mesh.collectives import AsyncAllToAll, swapped

    axis, x = open_axes(Degrees(tp=size), rank).tp, torch.ones(2)
    found: list[str | None] = []
    watch = threading.Timer(0.5, lambda: found.append(waits_for()))
    dist.all_reduce(x, group=axis.group)
    if rank == 0:
        time.sleep(1)
    else:
        watch.start()
    if how == "collective":
        dist.all_reduce(x, group=axis.group)
    elif how == "exchange":
        exchange = AsyncAllToAll(axis, [1, 1], [1, 1])
        exchange.issue(x, [1, 1], [1, 1])
        exchange.finish()
    elif how == "message":
        dist.recv(x, 0) if rank else dist.send(x, 1)
    elif how == "swap":
        swapped(x, 1 - rank, axis)
    else:
        time.sleep(1)
    if rank:
        watch.join()
    return found[0] if found else None


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("collective", "all_reduce 2 of tp"),
        ("exchange", "all_to_all 2 of tp"),
        ("message", "a message"),
        ("swap", "a message"),
        ("nothing", None),
    ],
)
def test_a_rank_says_what_it_waits_for(how: str, said: str | None) -> None:
    assert run_world(2, seen_waiting, how)[1] == said
