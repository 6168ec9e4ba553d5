"""A world of processes gives results in order, the first error, and an end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.worlds import WorldError, run_world


def _sum(rank: int, size: int, scale: float) -> tuple[int, torch.Tensor]:
    total = torch.full((3,), (rank + 1) * scale, dtype=torch.float64)
    dist.all_reduce(total)
    return rank, total


def _seed(rank: int, size: int) -> tuple[float, int]:
    return torch.rand(()).item(), torch.get_num_threads()


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
    (folder / f"pids-{rank}").write_text(f"{os.getpid()} {child.pid}")
    if rank == 0:
        dist.all_reduce(torch.zeros(1))
    time.sleep(600)


def _die(rank: int, size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def _without_group(rank: int, size: int) -> bool:
    return dist.is_initialized()


def test_results_come_in_rank_order() -> None:
    results = run_world(3, _sum, 0.5)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(total, torch.full((3,), 3.0, dtype=torch.float64)) for _, total in results)


def test_ranks_start_alike() -> None:
    first, second = run_world(2, _seed)
    assert first == second
    assert first[1] == 1


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
    pids = [int(pid) for path in tmp_path.glob("pids-*") for pid in path.read_text().split()]
    assert len(pids) == 4
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert alive == []
