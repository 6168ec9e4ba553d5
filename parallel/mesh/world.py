"""The processes of a run: who this one is, what device it has, and sums over all of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from parallel.config.degrees import Degrees
from parallel.config.parallel import ParallelConfig
from parallel.config.rendezvous import Rendezvous
from parallel.mesh.axes import Axes, open_axes, open_group
from parallel.mesh.heartbeat import Heartbeat, monitored, patience
from parallel.mesh.progress import Progress
from parallel.mesh.rendezvous import open_store, wait_for_ranks


@dataclass(frozen=True)
class World:
    """This process among all, and its coordinate on every axis of the mesh.

    storage: the group of all ranks, None of one, for waits in which a rank works on files. progress says what
    this process is at.
    """

    rank: int
    size: int
    device: torch.device
    axes: Axes
    storage: dist.ProcessGroup | None = None
    progress: Progress = field(default_factory=Progress)

    @staticmethod
    def alone(device: torch.device) -> "World":
        """The only process."""
        return World(0, 1, device, open_axes(Degrees(), 0))

    def sum(self, x: Tensor) -> Tensor:
        """x summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The x of all processes, in rank order along a new first dim."""
        if self.size == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    def barrier(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def open_world(
    config: ParallelConfig,
    rank: int,
    size: int,
    local_rank: int,
    rendezvous: Rendezvous | None = None,
    facts: Mapping[str, str] | None = None,
    record: Path | None = None,
) -> Iterator[World]:
    """The World of this process; its process group lives as long as the block.

    Several processes need a rendezvous, and the same facts, such as keys of the config. NCCL on GPUs, gloo
    elsewhere. On a CPU, numbers too small for the normal form count as zero from here on, in the whole
    process. Into the folder `record` ranks write what they were at when another one is lost.

    Raises PeerError that names the rank which did not come, ended or hangs, and ConfigError for processes
    that disagree on how many they are, or on a fact.
    """
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Products of decays reach numbers below 1e-38, on which a CPU computes many times as slowly. Threads
        # take the setting from the one that starts them: it comes before the first parallel operation.
        torch.set_flush_denormal(True)
    if size == 1:
        with _group_of_one(device) if config.data == "zero" else nullcontext():
            yield World.alone(device)
        return
    assert rendezvous is not None, f"{size=}"
    seconds, degrees = config.timeout_seconds, config.degrees(size)
    store = open_store(rendezvous, seconds, is_host=rank == 0 and not rendezvous.is_hosted)
    wait_for_ranks(store, rendezvous, rank, size, seconds, facts)
    own = open_store(rendezvous, seconds, is_host=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = patience(seconds)
    timeout = timedelta(seconds=wait)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        progress = Progress()
        with monitored(Heartbeat(store, own, rank, degrees, wait, progress, record)):
            axes = open_axes(degrees, rank, partial(open_group, timeout=timeout))
            # On CPUs also where the run is on GPUs: a disk may take longer than a collective of a step.
            patient = timedelta(seconds=config.storage_timeout_seconds)
            storage = open_group(range(size), "storage", patient, "gloo")
            yield World(rank, size, device, axes, storage, progress)
    finally:
        dist.destroy_process_group()


@contextmanager
def _group_of_one(device: torch.device) -> Iterator[None]:
    # DeepSpeed wants a process group also where there is one process.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
