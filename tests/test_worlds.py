"""A world of processes gives results in order, the first error, and an end."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests import worlds
from tests.worlds import WorldError, run_world

ROOT = Path(__file__).parents[1]


def _sum(rank: int, size: int, scale: float) -> tuple[int, torch.Tensor]:
    total = torch.full((3,), (rank + 1) * scale, dtype=torch.float64)
    dist.all_reduce(total)
    return rank, total


def _seed(rank: int, size: int) -> float:
    return torch.rand(()).item()


def _arithmetic(rank: int, size: int) -> worlds.Arithmetic:
    return worlds.Arithmetic.of_here()


def test_ranks_multiply_as_the_process_that_starts_them() -> None:
    here = worlds.Arithmetic.of_here()
    try:
        for wanted in (worlds.Arithmetic(2, has_onednn=False), worlds.Arithmetic(1, has_onednn=True)):
            wanted.take()
            assert run_world(1, _arithmetic, initialise=False) == [wanted]
    finally:
        here.take()


def _fail_while_others_wait(rank: int, size: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    dist.all_reduce(torch.zeros(1))


class _Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def _fail_unpicklably(rank: int, size: int) -> None:
    raise _Unpicklable(1, 2)


def _hang(rank: int, size: int, folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    for pid in (os.getpid(), child.pid):
        (folder / f"pid-{pid}").touch()
    if rank == 0:
        dist.all_reduce(torch.zeros(1))
    time.sleep(600)


def _die(rank: int, size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def _without_group(rank: int, size: int) -> bool:
    return dist.is_initialized()


def hanging(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def survivors(folder: Path) -> list[psutil.Process]:
    pids = hanging(folder)
    assert len(pids) == 4
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    # They would live for ten minutes; a busy machine may take some seconds to end them.
    return psutil.wait_procs(processes, timeout=30)[1]


def test_results_come_in_rank_order() -> None:
    results = run_world(3, _sum, 0.5)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(total, torch.full((3,), 3.0, dtype=torch.float64)) for _, total in results)


def test_ranks_start_alike() -> None:
    first, second = run_world(2, _seed)
    assert first == second


def test_the_group_is_optional() -> None:
    assert run_world(2, _without_group, initialise=False) == [False, False]


def test_the_first_error_is_raised_with_its_traceback() -> None:
    with pytest.raises(KeyError, match="the cause") as caught:
        run_world(2, _fail_while_others_wait)
    assert "in rank 1 of 2" in caught.value.__notes__[0]
    assert "_fail_while_others_wait" in caught.value.__notes__[0]


def test_an_error_that_cannot_travel_keeps_its_text() -> None:
    with pytest.raises(WorldError, match="1 and 2"):
        run_world(1, _fail_unpicklably)


def test_a_rank_that_dies_is_named() -> None:
    # Rank 0 may notice its peer's end before the parent does; both say that the world broke.
    with pytest.raises(RuntimeError, match=r"rank 1 ended with exit code 3|[Cc]onnection"):
        run_world(2, _die)


def test_a_hang_is_cut_and_leaves_no_process(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] gave no result in time") as caught:
        run_world(2, _hang, tmp_path, timeout=6.0)
    assert time.monotonic() - start < 15
    assert "all_reduce" in str(caught.value)
    assert survivors(tmp_path) == []


def test_ranks_end_with_a_session_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\n"
        "from tests import test_worlds, worlds\n"
        "if __name__ == '__main__':\n"
        "    worlds.run_world(2, test_worlds._hang, pathlib.Path(sys.argv[1]))\n"
    )
    session = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(hanging(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    session.kill()
    session.wait()
    assert survivors(tmp_path) == []


def test_of_two_errors_the_earlier_is_raised(tmp_path: Path) -> None:
    readers = []
    for moment, error in ((2.0, ValueError("effect")), (1.0, KeyError("cause"))):
        reader, writer = multiprocessing.Pipe(duplex=False)
        writer.send_bytes(pickle.dumps((moment, None, error)))
        readers.append(reader)
    processes: list[BaseProcess] = [multiprocessing.Process() for _ in readers]
    with pytest.raises(KeyError, match="cause"):
        worlds._collect(processes, readers, tmp_path, time.monotonic() + 5)
