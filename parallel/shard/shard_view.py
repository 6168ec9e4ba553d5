"""A rank's part of a tensor in the form that checkpoints are written from and read into.

Checkpoints know whole tensors only, so that any layout reads what any other has written.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.shard.shard_map import ShardMap, TensorSlice, local_slices


class GlobalShardView(Tensor):
    """A tensor with the shape of the whole and the memory of a part.

    Speaks the protocol by which torch.distributed.checkpoint asks a tensor for its blocks. Reading mutates
    the tensor that it was made of.
    """

    blocks: dict[tuple[int, ...], tuple[Tensor, TensorSlice]]

    @staticmethod
    def of(x: Tensor, shard_map: ShardMap) -> "GlobalShardView":
        """The stored form of a parameter, or of what has its form, such as a moment of its optimizer."""
        # No memory: all elements of the whole are one.
        whole = torch.empty((), dtype=x.dtype).expand(shard_map.shape)
        view = Tensor._make_subclass(GlobalShardView, whole)
        found = local_slices(x.detach(), shard_map)
        view.blocks = {piece.global_offset: (block, piece) for block, piece in found}
        return view

    @staticmethod
    def of_flat_slice(numbers: Tensor, start: int, shape: torch.Size) -> "GlobalShardView":
        """The stored form of neighbouring numbers of a whole that is one row, from its number `start`."""
        view = Tensor._make_subclass(GlobalShardView, torch.empty((), dtype=numbers.dtype).expand(shape))
        found = flat_slices(shape, start, start + numbers.numel())
        parts = numbers.split([math.prod(piece.sizes) for piece in found])
        view.blocks = {
            piece.global_offset: (part.view(piece.sizes), piece)
            for part, piece in zip(parts, found, strict=True)
        }
        return view

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """One item for each block."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(corner)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for corner, chunk in zip(self.blocks, self.__create_chunk_list__(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Corner and sizes of each block in the whole."""
        return [
            ChunkStorageMetadata(torch.Size(corner), torch.Size(piece.sizes))
            for corner, (_, piece) in self.blocks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The block at a corner, as a view."""
        assert index.offset is not None, f"{index=}"
        return self.blocks[tuple(index.offset)][0]


def flat_slices(shape: Sequence[int], start: int, stop: int) -> list[TensorSlice]:
    """The blocks that numbers `start` to `stop` of a tensor are, in order: part of a row, rows, part."""
    if start >= stop:
        return []
    if not shape:
        return [TensorSlice((), (), ())]
    size = math.prod(shape[1:])
    first, last = -(-start // size), stop // size
    if first > last:
        return _within(start // size, shape, start, stop)
    found = _within(first - 1, shape, start, first * size)
    if first < last:
        corner = (first, *[0] * (len(shape) - 1))
        found.append(TensorSlice((0,) * len(shape), corner, (last - first, *shape[1:])))
    return found + _within(last, shape, last * size, stop)


def _within(row: int, shape: Sequence[int], start: int, stop: int) -> list[TensorSlice]:
    # The blocks of numbers that lie in one row.
    at = row * math.prod(shape[1:])
    slices = flat_slices(shape[1:], start - at, stop - at)
    return [
        TensorSlice((0, *piece.local_offset), (row, *piece.global_offset), (1, *piece.sizes))
        for piece in slices
    ]
