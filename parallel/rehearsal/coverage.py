"""Whether the blocks that all ranks of a world hold make up every parameter, by arithmetic on shapes.

A dense parameter is cut over the tensor axis, experts over the expert axis; what a rank of that axis has is
sharded again over the ranks that share it. Every rank is one pair of coordinates.
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
from parallel.shard.expert import expert_shard_map
from parallel.shard.shard_map import ShardMap, TensorSlice
from parallel.shard.tensor import apply_tp

# Corner in the whole and sizes of a block.
Block = tuple[tuple[int, ...], tuple[int, ...]]


class CoverageCheck:
    """The blocks of all ranks, from the shard maps of each coordinate on the tensor and expert axes."""

    def __init__(self, config: Architecture, built: Parallel, axes: Axes) -> None:
        self._axes, self._shard_maps = axes, built.shard_maps
        # Which dim data parallelism cuts and into how many parts.
        self._cuts = {name: _cut(parameter) for name, parameter in built.named_parameters()}
        self._dense = [_dense_shard_maps(config, built, axes, axis_rank) for axis_rank in range(axes.tp.size)]

    def parts(self, name: str) -> tuple[ShardMap, ...]:
        """What each rank of the axis that shards the parameter has of it."""
        shard_map = self._shard_maps[name]
        if shard_map.is_expert:
            degree = self._axes.ep.size
            return tuple(expert_shard_map(shard_map.shape, axis_rank, degree) for axis_rank in range(degree))
        return tuple(shard_maps.get(name, shard_map) for shard_maps in self._dense)

    def blocks(self, name: str) -> frozenset[Block]:
        """The different blocks of a parameter that some rank holds."""
        return _blocks(self.parts(name), *self._cuts[name])

    def violations(self, held: Mapping[str, Sequence[Block]]) -> list[str]:
        """What is missing, held in two pieces that overlap, or held where it should not be, a line each.

        held are the blocks that some ranks really hold of each parameter.
        """
        found = []
        for name, shard_map in self._shard_maps.items():
            blocks = self.blocks(name)
            missing, doubled = _uncovered(shard_map.shape, blocks)
            if missing:
                found.append(f"{name}: {missing} numbers are held by no rank")
            if doubled:
                found.append(f"{name}: {doubled} numbers are held in blocks that overlap")
            foreign = [block for block in held.get(name, ()) if block not in blocks]
            found += [f"{name}: a rank holds {sizes} at {corner}" for corner, sizes in foreign]
        return found


def _dense_shard_maps(
    config: Architecture, built: Parallel, axes: Axes, axis_rank: int
) -> dict[str, ShardMap]:
    if axes.tp.size == 1:
        return {}
    found: dict[str, ShardMap] = {}
    for part in built.parts:
        with torch.device("meta"):
            model = ModelPart(config, layers=part.layers)
        found |= apply_tp(model, config, replace(axes.tp, rank=axis_rank))
    return found


def _cut(parameter: nn.Parameter) -> tuple[int | None, int]:
    if isinstance(parameter, DTensor):
        for degree, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            if isinstance(placement, Shard):
                return placement.dim, degree
    return None, 1


@cache
def _blocks(parts: tuple[ShardMap, ...], dim: int | None, degree: int) -> frozenset[Block]:
    return frozenset(
        block for part in parts for piece in part.slices for block in _pieces(part, piece, dim, degree)
    )


def _pieces(part: ShardMap, piece: TensorSlice, dim: int | None, degree: int) -> list[Block]:
    """The pieces of a box where its part is cut along a dim."""
    if dim is None:
        return [(piece.global_offset, piece.sizes)]
    length = max(other.local_offset[dim] + other.sizes[dim] for other in part.slices)
    found = []
    for axis_rank in range(degree):
        size, start = Shard.local_shard_size_and_offset(length, degree, axis_rank)
        low = max(start, piece.local_offset[dim])
        high = min(start + size, piece.local_offset[dim] + piece.sizes[dim])
        if high > low:
            corner, sizes = list(piece.global_offset), list(piece.sizes)
            corner[dim] += low - piece.local_offset[dim]
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
