"""Where a rank's part of a parameter lies in the whole parameter."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import _disable_current_modes

from model.mixer import TPShard


class Box(NamedTuple):
    """A block of numbers: its corner in the part, its corner in the whole, and its sizes.

    kv_replicas: so many neighbours along the tensor axis hold the same block.
    """

    part: tuple[int, ...]
    whole: tuple[int, ...]
    sizes: tuple[int, ...]
    kv_replicas: int = 1

    def of_part(self, x: Tensor) -> Tensor:
        """The block of a rank's part, as a view."""
        return x[tuple(slice(at, at + size) for at, size in zip(self.part, self.sizes, strict=True))]

    def of_whole(self, x: Tensor) -> Tensor:
        """The block of the whole, as a view."""
        return x[tuple(slice(at, at + size) for at, size in zip(self.whole, self.sizes, strict=True))]


@dataclass(frozen=True)
class Placement:
    """Which blocks of the whole parameter a rank's part is made of, before data parallelism cuts the part.

    shape is that of the whole. is_expert says that the part is one rank's experts, which other ranks share
    than those that share dense parameters.
    """

    shape: torch.Size
    boxes: tuple[Box, ...]
    is_expert: bool = False

    def cut(self, whole: Tensor) -> Tensor:
        """The rank's part of the whole."""
        sizes = [max(box.part[dim] + box.sizes[dim] for box in self.boxes) for dim in range(whole.ndim)]
        part = whole.new_empty(sizes)
        for box in self.boxes:
            box.of_part(part).copy_(box.of_whole(whole))
        return part


def undivided(shape: torch.Size, kv_replicas: int = 1) -> Placement:
    """The whole parameter on every rank."""
    corner = (0,) * len(shape)
    return Placement(shape, (Box(corner, corner, tuple(shape), kv_replicas),))


def placed(
    shape: torch.Size, whole: TPShard, part: TPShard, part_shape: torch.Size, rank: int, degree: int
) -> Placement:
    """The placement of a rank's part, from the splits of the whole parameter and of the part.

    Each of the parts along the split dim goes to ranks in order; where it has fewer units than there are
    ranks, neighbours share one.
    """
    if whole.dim is None or degree == 1:
        return undivided(shape, degree)
    rows, part_rows = whole.rows or (shape[whole.dim],), part.rows or (part_shape[whole.dim],)
    boxes, at, part_at = [], 0, 0
    for length, size in zip(rows, part_rows, strict=True):
        if size:
            pieces = length // size
            corner, part_corner = [0] * len(shape), [0] * len(shape)
            corner[whole.dim] = at + rank * pieces // degree * size
            part_corner[whole.dim] = part_at
            sizes = list(shape)
            sizes[whole.dim] = size
            boxes.append(Box(tuple(part_corner), tuple(corner), tuple(sizes), degree // pieces))
        at, part_at = at + length, part_at + size
    return Placement(shape, tuple(boxes))


def shard_of(x: Tensor) -> tuple[Tensor, Sequence[int]]:
    """What this rank holds of its part after data parallelism, and the corner of that in the part."""
    if not isinstance(x, DTensor):
        return x, (0,) * x.ndim
    # Arithmetic on shapes, which needs numbers also where all tensors are shapes alone.
    with _disable_current_modes():
        _, corner = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return x.to_local(), corner


def held_boxes(x: Tensor, placement: Placement) -> Iterator[tuple[Tensor, Box]]:
    """The blocks that this rank holds of a parameter, or of what has its form: views, and where they lie.

    Corners of parts are given within what the rank holds.
    """
    held, corner = shard_of(x)
    for box in placement.boxes:
        low = [max(a, b) for a, b in zip(corner, box.part, strict=True)]
        ends = zip(corner, held.shape, box.part, box.sizes, strict=True)
        high = [min(a + size, b + box_size) for a, size, b, box_size in ends]
        sizes = tuple(b - a for a, b in zip(low, high, strict=True))
        if all(size > 0 for size in sizes) or (not sizes and math.prod(held.shape)):
            shift = [a - b for a, b in zip(low, box.part, strict=True)]
            whole = tuple(a + b for a, b in zip(box.whole, shift, strict=True))
            inside = tuple(a - b for a, b in zip(low, corner, strict=True))
            found = Box(inside, whole, sizes, box.kv_replicas)
            yield found.of_part(held), found
