"""Worlds of gloo processes on this machine, cheap enough for a unit test."""

import faulthandler
import functools
import multiprocessing
import multiprocessing.context
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "tests.shapes",
    "tests.preload",
)


class WorldError(RuntimeError):
    """A rank ended without a result, or with an exception that cannot travel between processes."""


class _Outcome(NamedTuple):
    rank: int
    moment: float  # seconds of the machine's monotonic clock, which all processes share
    result: Any
    error: BaseException | None


def run_world(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    initialise: bool = True,
) -> list[Any]:
    """What `function(rank, size, *args)` returned on each of `size` processes, in rank order.

    `function` must be importable (top level of a module), its arguments and results picklable. Each
    process multiplies as this one does, has the same seed, and with `initialise` a gloo default group.
    `timeout` is in seconds and covers everything. No process outlives the call.

    Raises the exception of the rank that failed first, with that rank's traceback as a note;
    WorldError when a rank died or its exception cannot be pickled; TimeoutError, with the stacks of
    the ranks that hang.
    """
    context = _context()
    job = pickle.dumps((Arithmetic.of_here(), function, args))
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="world-") as name:
        folder, processes, readers = Path(name), [], []
        try:
            for rank in range(size):
                reader, writer = context.Pipe(duplex=False)
                rank_of_world = (rank, size, timeout if initialise else None)
                process = context.Process(target=_run_rank, args=(rank_of_world, folder, writer, job))
                process.start()
                writer.close()
                processes.append(process)
                readers.append(reader)
            return _collect(processes, readers, folder, deadline)
        finally:
            _end(processes)
            for reader in readers:
                reader.close()


class Arithmetic(NamedTuple):
    """What of this process decides how torch rounds: its threads, and whether oneDNN multiplies matrices."""

    threads: int
    has_onednn: bool

    @classmethod
    def of_here(cls) -> "Arithmetic":
        import torch

        return cls(torch.get_num_threads(), torch._C._get_mkldnn_enabled())

    def take(self) -> None:
        """Sets this process so."""
        import torch

        torch.set_num_threads(self.threads)
        torch.backends.mkldnn.set_flags(self.has_onednn)


def process_pool(size: int) -> ProcessPoolExecutor:
    """`size` processes that check shapes as ranks do. They end with the pool."""
    return ProcessPoolExecutor(size, _context())


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    # One server imports torch once; each rank is then a fork of it, in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _collect(
    processes: list[BaseProcess], readers: list[Connection], folder: Path, deadline: float
) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        pending = [rank for rank in range(len(readers)) if rank not in results]
        ready = wait([readers[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(_hang_report(processes, pending, folder))
        arrived = [rank for rank in pending if readers[rank] in ready]
        outcomes = [_receive(rank, readers[rank], processes[rank]) for rank in arrived]
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:
            # A rank whose peer has gone fails too; the first in time is the cause.
            raise min(failed, key=lambda outcome: outcome.moment).error or AssertionError
        results |= {outcome.rank: outcome.result for outcome in outcomes}
    return [results[rank] for rank in range(len(readers))]


def _receive(rank: int, reader: Connection, process: BaseProcess) -> _Outcome:
    try:
        return _Outcome(rank, *pickle.loads(reader.recv_bytes()))
    except EOFError:
        process.join(5.0)
        error = WorldError(f"rank {rank} ended with exit code {process.exitcode} and no result")
        return _Outcome(rank, time.monotonic(), None, error)


def _hang_report(processes: list[BaseProcess], pending: list[int], folder: Path) -> str:
    for rank in pending:
        with suppress(ProcessLookupError):
            os.kill(processes[rank].pid or 0, signal.SIGUSR2)
    time.sleep(0.3)  # the handlers write their files
    stacks = [f"rank {rank}:\n{(folder / f'stack-{rank}').read_text()}" for rank in pending]
    return "\n".join([f"ranks {pending} gave no result in time", *stacks])


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        # The whole session of the rank, so that its own children go with it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or -1, signal.SIGKILL)
        process.kill()
    for process in processes:
        process.join()
        process.close()


def _run_rank(
    rank_of_world: tuple[int, int, float | None], folder: Path, writer: Connection, job: bytes
) -> None:
    rank, size, group_timeout = rank_of_world
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stack = (folder / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR2, stack, all_threads=False)
    result, error = None, None
    try:
        result = _call(rank, size, group_timeout, folder, job)
    except BaseException as caught:
        caught.add_note(f"in rank {rank} of {size}:\n{traceback.format_exc()}")
        error = caught
    moment = time.monotonic()
    try:
        message = pickle.dumps((moment, result, error))
        pickle.loads(message)  # an exception may pickle and still not come back
    except Exception:
        text = traceback.format_exc() if error is None else "".join(getattr(error, "__notes__", []))
        message = pickle.dumps((moment, None, WorldError(f"rank {rank} of {size}: {text}")))
    writer.send_bytes(message)
    writer.close()
    # Threads of gloo and of data loaders must not hold the process up.
    os._exit(0)


def _end_with_parent() -> None:
    # The test session may be killed outright, with no chance to clean up.
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is always started by run_world"
    parent.join()
    os.killpg(os.getpid(), signal.SIGKILL)


def _call(rank: int, size: int, group_timeout: float | None, folder: Path, job: bytes) -> Any:
    import torch
    import torch.distributed as dist

    from tests import shapes

    shapes.check_imports()
    arithmetic, function, args = pickle.loads(job)
    arithmetic.take()
    torch.manual_seed(0)
    if group_timeout is not None:
        # By a file and not by a port: worlds side by side cannot meet.
        rendezvous, wait_at_most = f"file://{folder / 'store'}", timedelta(seconds=group_timeout)
        dist.init_process_group("gloo", rendezvous, wait_at_most, rank=rank, world_size=size)
    result = function(rank, size, *args)
    if group_timeout is not None and dist.is_initialized():
        # A rank that leaves early would break a collective that its peers are still in.
        dist.barrier()
    return result
