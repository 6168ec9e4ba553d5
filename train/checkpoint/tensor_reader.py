"""Tensors of a verified checkpoint by their rows, without the rest of them in memory."""

from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from conf.errors import CheckpointError
from train.checkpoint.transient import retried


class _Block(NamedTuple):
    """Where the numbers of a stored block lie: the byte of its storage in the file, and its strides there."""

    file: str
    at: int
    stride: tuple[int, ...]
    offset: int


class _Part(NamedTuple):
    """Rows of a stored block from its `row` on: where they lie in those that were asked for."""

    chunk: ChunkStorageMetadata
    row: int
    corner: tuple[int, ...]
    sizes: torch.Size


def _part(chunk: ChunkStorageMetadata, first: int, stop: int) -> _Part | None:
    """What a block has of rows `first` to `stop` of its tensor."""
    corner, sizes = tuple(chunk.offsets) or (0,), tuple(chunk.sizes) or (1,)
    low, high = max(first, corner[0]), min(stop, corner[0] + sizes[0])
    if low >= high or 0 in sizes:
        return None
    own = torch.Size([high - low, *sizes[1:]])
    return _Part(chunk, low - corner[0], (low - first, *corner[1:]), own)


class TensorReader:
    """The tensors of a checkpoint that was verified, whose metadata came through `read_metadata`.

    Holds its files open as a context: a run that goes on may delete the checkpoint.
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self._path, self._metadata = path, metadata
        self._blocks: dict[MetadataIndex, _Block] = {}
        self._files: dict[str, FileIO] = {}
        self._open = ExitStack()

    def __enter__(self) -> "TensorReader":
        """Raises OSError for a file that cannot be opened."""
        with ExitStack() as opening:
            for name in {record.relative_path for record in self._metadata.storage_data.values()}:
                path = self._path / name
                file = retried(lambda path=path: FileIO(path))
                self._files[name] = opening.enter_context(file)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._files.clear()

    def rows(self, key: str, first: int, stop: int) -> Tensor:
        """Rows of a tensor along its first dim, in one piece of memory of their own; a scalar is one row.

        Raises CheckpointError where a file has changed since it was verified, OSError where it cannot be
        read, in several tries.
        """
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata), f"{key} is no tensor"
        shape = torch.Size([stop - first, *(stored.size or (1,))[1:]])
        dtype = stored.properties.dtype
        parts = [part for chunk in stored.chunks if (part := _part(chunk, first, stop)) is not None]
        if len(parts) == 1 and parts[0].sizes == shape:
            return self._rows_of(key, parts[0], dtype).contiguous()
        if (missing := shape.numel() - sum(part.sizes.numel() for part in parts)) > 0:
            raise CheckpointError(f"{self._path}: holds no blocks for {missing} numbers of {key}")
        found = torch.empty(shape, dtype=dtype)
        for part in parts:
            block = tuple(slice(at, at + size) for at, size in zip(part.corner, part.sizes, strict=True))
            found[block] = self._rows_of(key, part, dtype)
        return found

    def _rows_of(self, key: str, part: _Part, dtype: torch.dtype) -> Tensor:
        """The part of a stored block, as it lies there."""
        index = MetadataIndex(key, part.chunk.offsets)
        if index not in self._blocks:
            self._blocks[index] = self._locate(index)
        block = self._blocks[index]
        stride = block.stride or (1,)
        start = block.offset + part.row * stride[0]
        last = start + sum((size - 1) * step for size, step in zip(part.sizes, stride, strict=True))
        raw = self._read(block.file, block.at + start * dtype.itemsize, (last + 1 - start) * dtype.itemsize)
        return raw.view(dtype).as_strided(part.sizes, stride)

    def _locate(self, index: MetadataIndex) -> _Block:
        record = self._metadata.storage_data[index]
        file = self._files[record.relative_path]
        view = cast(IO[bytes], _create_file_view(file, record.offset, record.length))

        def load() -> Tensor:
            view.seek(0)
            # Without numbers: what is unpickled are shape and strides, and torch says where the rest begins.
            with FakeTensorMode():
                return torch.load(view, weights_only=True)

        tensor = retried(load)
        # What torch.load sets on a storage without numbers.
        at = record.offset + tensor.untyped_storage()._checkpoint_offset  # pyright: ignore[reportAttributeAccessIssue]
        return _Block(record.relative_path, at, tensor.stride(), int(tensor.storage_offset()))

    def _read(self, name: str, start: int, size: int) -> Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        buffer = memoryview(raw.numpy())  # pyright: ignore[reportArgumentType]
        file = self._files[name]

        def read() -> int:
            file.seek(start)
            done = 0
            while done < size and (count := file.readinto(buffer[done:])):
                done += count
            return done

        if (found := retried(read)) != size:
            raise CheckpointError(f"{self._path / name}: ends after {found} of {size} bytes at {start}")
        return raw
