"""How many ways each axis of the mesh is cut, and which ranks lie along an axis; without torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Axes of the mesh, outermost first: neighbours along tp are neighbours on a node.
ORDER = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


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
    def batch(self) -> int:
        """Number of ranks with rows of their own."""
        return self.dp_replicate * self.dp_shard

    def describe(self) -> str:
        """The number of processes as a product: `16 = dp_replicate 2 x dp_shard 8, ep 4`."""
        cut = [f"{name} {getattr(self, name)}" for name in ORDER if getattr(self, name) > 1]
        experts = f", ep {self.ep}" if self.ep > 1 else ""
        return f"{self.size} = {' x '.join(cut) or 'one process'}{experts}"


def coordinates(degrees: Degrees, rank: int) -> dict[str, int]:
    """The coordinate of a rank along each axis of the mesh."""
    found = {}
    for name in reversed(ORDER):
        rank, found[name] = divmod(rank, getattr(degrees, name))
    return found


def grid_lines(degrees: Degrees, along: Sequence[str]) -> list[tuple[int, ...]]:
    """The ranks of the mesh in lines that run along some axes, one line for each coordinate on the others."""
    lines: dict[tuple[int, ...], list[int]] = {}
    for rank in range(degrees.size):
        key = tuple(at for name, at in coordinates(degrees, rank).items() if name not in along)
        lines.setdefault(key, []).append(rank)
    return [tuple(line) for line in lines.values()]


def expert_lines(degrees: Degrees, *, across: bool) -> list[tuple[int, ...]]:
    """The ranks in lines of which each holds all experts once, or, across, the same experts."""
    block = math.prod((degrees.dp_shard, degrees.cp, degrees.tp))
    lines = []
    for start in range(0, degrees.size, block):
        ranks = range(start, start + block)
        if across:
            lines += [tuple(ranks[ep_rank :: degrees.ep]) for ep_rank in range(degrees.ep)]
        else:
            lines += [tuple(ranks[first : first + degrees.ep]) for first in range(0, block, degrees.ep)]
    return lines
