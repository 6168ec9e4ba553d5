"""The axes of the mesh: along which ranks a run is cut, and who shares what with whom."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist


class Degrees(NamedTuple):
    """How many ways each axis is cut. The product of all but `ep` is the number of processes.

    ep folds over dp_shard x cp x tp: each of its groups are `ep` neighbours there.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def rows(self) -> int:
        """Number of ranks with rows of their own."""
        return self.dp_replicate * self.dp_shard

    def describe(self) -> str:
        """The number of processes as a product: `16 = dp_replicate 2 x dp_shard 8, ep 4`."""
        cut = [f"{name} {getattr(self, name)}" for name in ORDER if getattr(self, name) > 1]
        experts = f", ep {self.ep}" if self.ep > 1 else ""
        return f"{self.size} = {' x '.join(cut) or 'one process'}{experts}"


@dataclass(frozen=True)
class Axis:
    """This rank's place along one axis. group is None where it is alone on it.

    ranks are those of the group in the order of their places.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """The degree of the axis."""
        return len(self.ranks)


# Axes of the mesh, outermost first: neighbours along tp are neighbours on a node.
ORDER = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Axes:
    """All axes of one rank.

    rows: the ranks with other rows of the batch, dp_replicate x dp_shard. shard: those that share a copy of
    the dense weights, dp_shard x cp. edp: those that share a copy of the same experts, dp_shard x cp x tp
    over ep. row: those with other tokens of the same rows,
    cp x tp. tokens: all ranks of the same pipeline stage.
    """

    degrees: Degrees
    pp: Axis
    dp_replicate: Axis
    dp_shard: Axis
    cp: Axis
    tp: Axis
    ep: Axis
    edp: Axis
    rows: Axis
    shard: Axis
    row: Axis
    tokens: Axis


Opener = Callable[[Sequence[int]], dist.ProcessGroup | None]


def open_group(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """A process group of some ranks, None on others. Every rank of the world must call it."""
    group = dist.new_group(list(ranks))
    return group if isinstance(group, dist.ProcessGroup) else None


def open_axes(degrees: Degrees, rank: int, opener: Opener = open_group) -> Axes:
    """The axes of a rank. Every rank must call it, with the same degrees: it opens the groups of all."""
    fixed = {
        "pp": ("pp",),
        "dp_replicate": ("dp_replicate",),
        "dp_shard": ("dp_shard",),
        "cp": ("cp",),
        "tp": ("tp",),
        "rows": ("dp_replicate", "dp_shard"),
        "shard": ("dp_shard", "cp"),
        "row": ("cp", "tp"),
        "tokens": ORDER[1:],
    }
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def axis(name: str, lines: Iterable[tuple[int, ...]]) -> Axis:
        own: tuple[int, ...] = (rank,)
        # Hybrid sharding wants a group for both dims of its mesh, even of one rank.
        least = 1 if degrees.dp_replicate > 1 and name in ("shard", "edp") else 2
        for line in lines:
            if len(line) >= least and line not in made:
                made[line] = opener(line)
            if rank in line:
                own = line
        return Axis(name, own.index(rank), own, made.get(own))

    axes = {name: axis(name, grid_lines(degrees, along)) for name, along in fixed.items()}
    axes["ep"] = axis("ep", _expert_lines(degrees, across=False))
    axes["edp"] = axis("edp", _expert_lines(degrees, across=True))
    return Axes(degrees=degrees, **axes)


def coordinates(degrees: Degrees, rank: int) -> dict[str, int]:
    """The place of a rank along each axis of the mesh."""
    places = {}
    for name in reversed(ORDER):
        rank, places[name] = divmod(rank, getattr(degrees, name))
    return places


def grid_lines(degrees: Degrees, along: Sequence[str]) -> list[tuple[int, ...]]:
    """The ranks of the mesh in lines that run along some axes, one line for each place on the others."""
    lines: dict[tuple[int, ...], list[int]] = {}
    for rank in range(degrees.size):
        places = coordinates(degrees, rank)
        key = tuple(place for name, place in places.items() if name not in along)
        lines.setdefault(key, []).append(rank)
    return [tuple(line) for line in lines.values()]


def _expert_lines(degrees: Degrees, *, across: bool) -> list[tuple[int, ...]]:
    block = math.prod((degrees.dp_shard, degrees.cp, degrees.tp))
    lines = []
    for start in range(0, degrees.size, block):
        ranks = range(start, start + block)
        if across:
            lines += [tuple(ranks[place :: degrees.ep]) for place in range(degrees.ep)]
        else:
            lines += [tuple(ranks[place : place + degrees.ep]) for place in range(0, block, degrees.ep)]
    return lines
