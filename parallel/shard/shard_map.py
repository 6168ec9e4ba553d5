"""Which slices of the whole parameter a rank holds."""

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


class TensorSlice(NamedTuple):
    """A block of a tensor: its offset in what the rank holds, its offset in the whole, and its sizes.

    replicas: so many neighbours along the tensor axis hold the same slice.
    """

    local_offset: tuple[int, ...]
    global_offset: tuple[int, ...]
    sizes: tuple[int, ...]
    replicas: int = 1

    def local_view(self, x: Tensor) -> Tensor:
        """The slice of the local tensor, as a view."""
        return x[tuple(slice(at, at + size) for at, size in zip(self.local_offset, self.sizes, strict=True))]

    def global_view(self, x: Tensor) -> Tensor:
        """The slice of the whole tensor, as a view."""
        return x[tuple(slice(at, at + size) for at, size in zip(self.global_offset, self.sizes, strict=True))]


@dataclass(frozen=True)
class ShardMap:
    """The slices of the whole parameter that a rank's part is made of, before FSDP shards the part.

    shape is that of the whole. is_expert says that the part is one rank's experts, which other ranks share
    than those that share dense parameters.
    """

    shape: torch.Size
    slices: tuple[TensorSlice, ...]
    is_expert: bool = False


def replicated(shape: torch.Size, replicas: int = 1) -> ShardMap:
    """The whole parameter on every rank."""
    corner = (0,) * len(shape)
    return ShardMap(shape, (TensorSlice(corner, corner, tuple(shape), replicas),))


def tp_shard_map(
    shape: torch.Size, whole: TPShard, part: TPShard, part_shape: torch.Size, rank: int, degree: int
) -> ShardMap:
    """The shard map of a rank's part, from the TPShards of the whole parameter and of the part.

    Each of the parts along the split dim goes to ranks in order; where it has fewer units than there are
    ranks, neighbours share one.
    """
    if whole.dim is None or degree == 1:
        return replicated(shape, degree)
    rows, part_rows = whole.rows or (shape[whole.dim],), part.rows or (part_shape[whole.dim],)
    slices, at, part_at = [], 0, 0
    for length, size in zip(rows, part_rows, strict=True):
        if size:
            pieces = length // size
            corner, part_corner = [0] * len(shape), [0] * len(shape)
            corner[whole.dim] = at + rank * pieces // degree * size
            part_corner[whole.dim] = part_at
            sizes = list(shape)
            sizes[whole.dim] = size
            slices.append(TensorSlice(tuple(part_corner), tuple(corner), tuple(sizes), degree // pieces))
        at, part_at = at + length, part_at + size
    return ShardMap(shape, tuple(slices))


def shard_of(x: Tensor) -> tuple[Tensor, Sequence[int]]:
    """What this rank holds of its part after FSDP, and the offset of that in the part."""
    if not isinstance(x, DTensor):
        return x, (0,) * x.ndim
    # Arithmetic on shapes, which needs numbers also where all tensors are shapes alone.
    with _disable_current_modes():
        _, corner = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return x.to_local(), corner


def local_slices(x: Tensor, shard_map: ShardMap) -> Iterator[tuple[Tensor, TensorSlice]]:
    """The slices that this rank holds of a parameter, or of what has its shape: views, and where they lie.

    Local offsets are within what the rank holds.
    """
    held, corner = shard_of(x)
    for piece in shard_map.slices:
        low = [max(a, b) for a, b in zip(corner, piece.local_offset, strict=True)]
        ends = zip(corner, held.shape, piece.local_offset, piece.sizes, strict=True)
        high = [min(a + size, b + piece_size) for a, size, b, piece_size in ends]
        sizes = tuple(b - a for a, b in zip(low, high, strict=True))
        if all(size > 0 for size in sizes) or (not sizes and math.prod(held.shape)):
            shift = [a - b for a, b in zip(low, piece.local_offset, strict=True)]
            whole = tuple(a + b for a, b in zip(piece.global_offset, shift, strict=True))
            inside = tuple(a - b for a, b in zip(low, corner, strict=True))
            found = TensorSlice(inside, whole, sizes, piece.replicas)
            yield found.local_view(held), found
