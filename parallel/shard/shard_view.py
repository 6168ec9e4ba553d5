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

from parallel.shard.shard_map import Box, Placement, held_boxes


class Stored(Tensor):
    """A tensor with the shape of the whole and the memory of a part.

    Speaks the protocol by which torch.distributed.checkpoint asks a tensor for its blocks. Reading mutates
    the tensor that it was made of.
    """

    blocks: dict[tuple[int, ...], tuple[Tensor, Box]]

    @staticmethod
    def of(x: Tensor, placement: Placement) -> "Stored":
        """The stored form of a parameter, or of what has its form, such as a moment of its optimizer."""
        # No memory: all elements of the whole are one.
        whole = torch.empty((), dtype=x.dtype).expand(placement.shape)
        stored = Tensor._make_subclass(Stored, whole)
        found = held_boxes(x.detach(), placement)
        stored.blocks = {box.whole: (block, box) for block, box in found}
        return stored

    @staticmethod
    def of_run(numbers: Tensor, start: int, shape: torch.Size) -> "Stored":
        """The stored form of neighbouring numbers of a whole that is one row, from its number `start`."""
        stored = Tensor._make_subclass(Stored, torch.empty((), dtype=numbers.dtype).expand(shape))
        found = run_boxes(shape, start, start + numbers.numel())
        parts = numbers.split([math.prod(box.sizes) for box in found])
        stored.blocks = {
            box.whole: (part.view(box.sizes), box) for part, box in zip(parts, found, strict=True)
        }
        return stored

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
            ChunkStorageMetadata(torch.Size(corner), torch.Size(box.sizes))
            for corner, (_, box) in self.blocks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The block at a corner, as a view."""
        assert index.offset is not None, f"{index=}"
        return self.blocks[tuple(index.offset)][0]


def run_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The blocks that numbers `start` to `stop` of a tensor are, in order: part of a row, rows, part."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), (), ())]
    size = math.prod(shape[1:])
    first, last = -(-start // size), stop // size
    if first > last:
        return _within(start // size, shape, start, stop)
    found = _within(first - 1, shape, start, first * size)
    if first < last:
        corner = (first, *[0] * (len(shape) - 1))
        found.append(Box((0,) * len(shape), corner, (last - first, *shape[1:])))
    return found + _within(last, shape, last * size, stop)


def _within(row: int, shape: Sequence[int], start: int, stop: int) -> list[Box]:
    # The blocks of numbers that lie in one row.
    at = row * math.prod(shape[1:])
    boxes = run_boxes(shape[1:], start - at, stop - at)
    return [Box((0, *box.part), (row, *box.whole), (1, *box.sizes)) for box in boxes]
