"""Whether the blocks that all ranks of a world hold make up every parameter, by arithmetic on shapes.

A dense parameter is cut over the tensor axis, experts over the expert axis; what a place on that axis has is
cut again over the ranks that share it. Every rank is one pair of places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from model.config import Architecture
from model.language_model import ModelPart
from parallel.apply import Parallel
from parallel.mesh.axes import Axes
from parallel.shard.expert import expert_placement
from parallel.shard.shard_map import Box, Placement
from parallel.shard.tensor import spread_tensors

# Corner in the whole and sizes of a block.
Block = tuple[tuple[int, ...], tuple[int, ...]]


class Tiling:
    """The blocks of all ranks, from the placements that each place on the tensor and expert axes gives."""

    def __init__(self, config: Architecture, built: Parallel, axes: Axes) -> None:
        self._axes, self._placements = axes, built.placements
        # Which dim data parallelism cuts and into how many parts.
        self._cuts = {name: _cut(parameter) for name, parameter in built.named_parameters()}
        self._dense = [_dense_placements(config, built, axes, place) for place in range(axes.tp.size)]

    def parts(self, name: str) -> tuple[Placement, ...]:
        """What each place on the axis that cuts the parameter has of it."""
        placement = self._placements[name]
        if placement.is_expert:
            degree = self._axes.ep.size
            return tuple(expert_placement(placement.shape, place, degree) for place in range(degree))
        return tuple(placements.get(name, placement) for placements in self._dense)

    def blocks(self, name: str) -> frozenset[Block]:
        """The different blocks of a parameter that some rank holds."""
        return _blocks(self.parts(name), *self._cuts[name])

    def violations(self, held: Mapping[str, Sequence[Block]]) -> list[str]:
        """What is missing, held in two pieces that overlap, or held where it should not be, a line each.

        held are the blocks that some ranks really hold of each parameter.
        """
        found = []
        for name, placement in self._placements.items():
            blocks = self.blocks(name)
            missing, doubled = _uncovered(placement.shape, blocks)
            if missing:
                found.append(f"{name}: {missing} numbers are held by no rank")
            if doubled:
                found.append(f"{name}: {doubled} numbers are held in blocks that overlap")
            foreign = [block for block in held.get(name, ()) if block not in blocks]
            found += [f"{name}: a rank holds {sizes} at {corner}" for corner, sizes in foreign]
        return found


def _dense_placements(config: Architecture, built: Parallel, axes: Axes, place: int) -> dict[str, Placement]:
    if axes.tp.size == 1:
        return {}
    found: dict[str, Placement] = {}
    for part in built.parts:
        with torch.device("meta"):
            model = ModelPart(config, layers=part.layers)
        found |= spread_tensors(model, config, replace(axes.tp, rank=place))
    return found


def _cut(parameter: nn.Parameter) -> tuple[int | None, int]:
    if isinstance(parameter, DTensor):
        for degree, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            if isinstance(placement, Shard):
                return placement.dim, degree
    return None, 1


@cache
def _blocks(parts: tuple[Placement, ...], dim: int | None, degree: int) -> frozenset[Block]:
    return frozenset(
        block for part in parts for box in part.boxes for block in _pieces(part, box, dim, degree)
    )


def _pieces(part: Placement, box: Box, dim: int | None, degree: int) -> list[Block]:
    """The pieces of a box where its part is cut along a dim."""
    if dim is None:
        return [(box.whole, box.sizes)]
    length = max(other.part[dim] + other.sizes[dim] for other in part.boxes)
    found = []
    for place in range(degree):
        size, start = Shard.local_shard_size_and_offset(length, degree, place)
        low = max(start, box.part[dim])
        high = min(start + size, box.part[dim] + box.sizes[dim])
        if high > low:
            corner, sizes = list(box.whole), list(box.sizes)
            corner[dim] += low - box.part[dim]
            sizes[dim] = high - low
            found.append((tuple(corner), tuple(sizes)))
    return found


@cache
def _uncovered(shape: torch.Size, blocks: frozenset[Block]) -> tuple[int, int]:
    """How many numbers of the whole are in no block, and how many in several."""
    edges = []
    for dim, size in enumerate(shape):
        starts = {corner[dim] for corner, _ in blocks}
        ends = {corner[dim] + sizes[dim] for corner, sizes in blocks}
        edges.append(np.array(sorted({0, size} | starts | ends)))
    holders = np.zeros([len(line) - 1 for line in edges], dtype=np.int32)
    for corner, sizes in blocks:
        cells = (
            slice(*np.searchsorted(line, (at, at + size)))
            for line, at, size in zip(edges, corner, sizes, strict=True)
        )
        holders[tuple(cells)] += 1
    numbers = np.ones((), dtype=np.int64)
    for line in edges:
        numbers = numbers[..., None] * np.diff(line)
    return int(numbers[holders == 0].sum()), int(numbers[holders > 1].sum())
