"""The collectives of a step as they are called: what kind, between which ranks, how many bytes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    """One call. bytes are those of its larger side, all ranks' parts together; sent those that leave this
    rank on a ring, in an all-to-all, or to one other rank.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int
    sent: int


class CollectiveTrace(TorchDispatchMode):
    """Lists every collective that runs within it, in order.

    Raises TypeError for a collective that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        # With each whether the autograd engine called it: in backward, or what backward computes again.
        self.found: list[tuple[Collective, bool]] = []
        self._ranks: dict[dist.ProcessGroup, tuple[int, ...]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here; to say so at every operation takes a tenth of a rehearsal.
        return False

    def taken(self) -> list[Collective]:
        """What was found since this was asked last."""
        found, self.found = self.found, []
        return [call for call, _ in found]

    def taken_by_phase(self) -> dict[str, list[Collective]]:
        """The same, apart what ran in forward and in backward; recomputation is part of backward."""
        found, self.found = self.found, []
        return {
            phase: [call for call, in_backward in found if in_backward == (phase == "backward")]
            for phase in ("forward", "backward")
        }

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # More than half of what a rehearsal asks, and slow on its way through the modes.
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor") and func not in sync_ops:
            if func not in collective_ops:
                raise TypeError(f"a collective that is not known: {func}")
            in_backward = torch._C._current_graph_task_id() != -1
            self.found.append((self._described(func, args, out), in_backward))
        return out

    def _described(self, func: Any, args: tuple[Any, ...], out: Any) -> Collective:
        kind, group = _kind(func), CollectiveOp.get_process_group(func, args)
        if group not in self._ranks:
            self._ranks[group] = tuple(dist.get_process_group_ranks(group))
        ranks = self._ranks[group]
        moved = max(_bytes(part) for part in (*args, out))
        if kind == "all_to_all":
            sent = _sent_rows(args, ranks.index(dist.get_rank()), len(ranks))
        else:
            sent = sent_bytes(kind, moved, len(ranks))
        return Collective(kind, ranks, moved, sent)


def sent_bytes(kind: str, moved: int, ranks: int) -> int:
    """The bytes that leave each rank, of a kind that treats all ranks alike, or of one between two."""
    if kind in ("send", "recv"):
        return moved if kind == "send" else 0
    return moved * (ranks - 1) // ranks * (2 if kind == "all_reduce" else 1)


def _kind(func: Any) -> str:
    name = func.overloadpacket.__name__
    for kind in ("reduce_scatter", "all_reduce", "all_gather", "all_to_all", "send", "recv"):
        if kind.replace("_", "") in name.replace("_", ""):
            return kind
    raise TypeError(f"a collective that is not known: {func}")


def _bytes(part: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(part) if isinstance(x, Tensor))


def _sent_rows(args: tuple[Any, ...], argument: int, ranks: int) -> int:
    # c10d.alltoall_base_(out, in, group, out_splits, in_splits)
    _, x, _, _, splits, *_ = args
    own = splits[argument] if splits else x.shape[0] // ranks
    rows = max(1, x.shape[0])
    return _bytes(x) * (rows - own) // rows
