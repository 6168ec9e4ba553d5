"""The axes of the mesh: along which ranks a run is cut, and who shares what with whom."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.config.degrees import ORDER, Degrees, expert_lines, grid_lines


@dataclass(frozen=True)
class Axis:
    """This rank's coordinate along one axis. group is None where it is alone on it.

    ranks are those of the group in the order of their coordinates.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """The degree of the axis."""
        return len(self.ranks)


@dataclass(frozen=True)
class Axes:
    """All axes of one rank.

    batch: the ranks with other rows of the batch, dp_replicate x dp_shard. shard: those that share a copy of
    the dense weights, dp_shard x cp. edp: those that share a copy of the same experts, dp_shard x cp x tp
    over ep. sequence: those with other tokens of the same rows, cp x tp. tokens: all ranks of the same
    pipeline stage.
    """

    degrees: Degrees
    pp: Axis
    dp_replicate: Axis
    dp_shard: Axis
    cp: Axis
    tp: Axis
    ep: Axis
    edp: Axis
    batch: Axis
    shard: Axis
    sequence: Axis
    tokens: Axis


Opener = Callable[[Sequence[int], str], dist.ProcessGroup | None]


def open_group(
    ranks: Sequence[int], name: str, timeout: timedelta | None = None, backend: str | None = None
) -> dist.ProcessGroup | None:
    """A process group of some ranks, None on others. Every rank of the world must call it.

    name is how torch's flight record calls it.

    timeout is how long a collective of it waits; None is what torch has for the backend, not what the world
    has. backend is that of the world where it is None.
    """
    group = dist.new_group(list(ranks), timeout=timeout, backend=backend, group_desc=name)
    return group if isinstance(group, dist.ProcessGroup) else None


def open_axes(degrees: Degrees, rank: int, opener: Opener = open_group) -> Axes:
    """The axes of a rank. Every rank must call it, with the same degrees: it opens the groups of all."""
    fixed = {
        "pp": ("pp",),
        "dp_replicate": ("dp_replicate",),
        "dp_shard": ("dp_shard",),
        "cp": ("cp",),
        "tp": ("tp",),
        "batch": ("dp_replicate", "dp_shard"),
        "shard": ("dp_shard", "cp"),
        "sequence": ("cp", "tp"),
        "tokens": ORDER[1:],
    }
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def axis(name: str, lines: Iterable[tuple[int, ...]]) -> Axis:
        own: tuple[int, ...] = (rank,)
        # Hybrid sharding wants a group for both dims of its mesh, even of one rank.
        least = 1 if degrees.dp_replicate > 1 and name in ("shard", "edp") else 2
        for line in lines:
            if len(line) >= least and line not in made:
                made[line] = opener(line, name)
            if rank in line:
                own = line
        return Axis(name, own.index(rank), own, made.get(own))

    axes = {name: axis(name, grid_lines(degrees, along)) for name, along in fixed.items()}
    axes["ep"] = axis("ep", expert_lines(degrees, across=False))
    axes["edp"] = axis("edp", expert_lines(degrees, across=True))
    return Axes(degrees=degrees, **axes)
