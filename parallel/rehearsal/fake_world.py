"""Any rank of any world in one process: peers that do nothing, and tensors that are shapes alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.moe.layer import Experts
from parallel.apply import Parallel
from parallel.config.parallel import ParallelConfig
from parallel.mesh.axes import open_axes, open_group
from parallel.mesh.world import World
from parallel.pipeline.runner import Stage
from parallel.shard.expert import AllToAll


@contextmanager
def stand_in(config: ParallelConfig, rank: int, size: int) -> Iterator[World]:
    """The World of one rank of `size`; its collectives give at once and move nothing.

    Only groups that this rank is in are opened. No process group may be open outside of the block.
    """
    device = torch.device("cpu")
    if size == 1:
        yield World.alone(device)
        return

    def own_group(ranks: Sequence[int], name: str) -> dist.ProcessGroup | None:
        return open_group(ranks, name) if rank in ranks else None

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, device, open_axes(config.degrees(size), rank, own_group))
    finally:
        dist.destroy_process_group()
        # What DTensor remembers of a mesh holds this rank's coordinates on it; the next rank's mesh is equal.
        _clear_sharding_prop_cache()


@dataclass(frozen=True)
class EvenAllToAll(AllToAll):
    """Dispatch of tokens that choose all ranks alike, where nobody knows what they choose."""

    def splits(
        self, counts: Int[Tensor, "E"], arriving: Int[Tensor, "E"], rows: int
    ) -> tuple[list[int], list[int]]:
        """All rows, as even as they go."""
        ranks = self.axis.size
        sent = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
        return sent, [sent[self.axis.rank]] * ranks


class Link(PipelineStage):
    """Does not ask its peers before the first step whether all know the shapes: they do, and cannot answer.

    Of torch 2.13; earlier ones do not ask.
    """

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.tensor([1])

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.tensor([1])


def materialise_shapes(built: Parallel) -> None:
    """Gives a model on the meta device fake tensors of the CPU, so that it can run. Mutates the model.

    To be called within a FakeTensorMode. Tokens choose experts evenly from here on, and each micro-batch of a
    pipeline is its first.
    """
    # Applied by hand: to_empty would have the mode keep what it is about to replace.
    for part in built.parts:
        part._apply(_fake)
        if isinstance(part, Stage):
            part.micro_batch_number = _first
    for module in built.modules():
        if isinstance(module, Experts) and isinstance(module.dispatch, AllToAll):
            given = module.dispatch
            module.dispatch = EvenAllToAll(given.axis, given.held, given.scales_input)


def _first(micro_batch_index: Tensor) -> int:
    return 0


def _fake(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return torch.empty(x.shape, dtype=x.dtype, device="cpu")
    held = torch.empty(x._local_tensor.shape, dtype=x.dtype, device="cpu")
    return DTensor.from_local(
        held, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )
