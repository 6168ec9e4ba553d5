"""torch.distributed.checkpoint on our terms: bytes digested as they are written, nothing unpickled freely."""

import io
import os
import pickle
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from conf.errors import CheckpointError
from train.checkpoint.ranks import PeerFailed, Ranks
from train.checkpoint.transient import retried

METADATA = ".metadata"

KeyPath = tuple[Any, ...]
_PLAIN = (bool, int, float, str, bytes, type(None))


class DigestingStream(io.RawIOBase):
    """A file open for writing, front to back, that knows the digest of every byte given to the system.

    The digest is of the bytes in memory: what the disk makes of them shows when they are read back.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb", buffering=0)
        self._digest = xxhash.xxh3_128()
        self.size_bytes = 0

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any, /) -> int:
        """Give all of `data`, any buffer, to the system; its size in bytes. Raises OSError."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            count = self._file.write(view[written:])
            self._digest.update(view[written : written + count])
            written += count
        self.size_bytes += written
        return written

    def tell(self) -> int:
        """How many bytes were written."""
        return self.size_bytes

    def close(self) -> None:
        """Make everything written durable and close the file. Raises OSError."""
        if not self.closed:
            with self._file:
                os.fsync(self._file.fileno())
        super().close()

    def entry(self) -> dict[str, Any]:
        """Size in bytes and digest of what was written, as the manifest lists them."""
        return {"size": self.size_bytes, "xxh3_128": self._digest.hexdigest()}


class DigestingFileSystem(FileSystem):
    """Writes files durably; `entries` has size and digest of each, `failure` the first error."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        """A stream to the new file `path`, on disk when the block ends. Raises OSError."""
        assert mode == "wb", f"{mode=}"
        try:
            with self.open_stream(Path(path)) as stream:
                yield stream
        except OSError as error:
            error.filename = error.filename or os.fspath(path)
            self.failure = self.failure or error
            raise
        except Exception as error:
            # torch's archive writer reports the failed write of its stream as an error of its own.
            self.failure = self.failure or _cause_of_storage(error)
            raise
        self.entries[Path(path).name] = stream.entry()

    def open_stream(self, path: Path) -> DigestingStream:
        """The stream that `create_stream` manages."""
        return DigestingStream(path)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a file; its entry goes with it."""
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


def _cause_of_storage(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class VerifiedReader(FileSystemReader):
    """Reads a checkpoint whose metadata came through `read_metadata` of this module."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata given at construction; no file is opened."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the tensors of the plan, from the start again where storage fails for a moment."""
        return retried(lambda: super(VerifiedReader, self).read_data(plan, planner))


class _Planner(DefaultLoadPlanner):
    """Loads a flat state; plain values may hold nothing but plain values."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def write_state(flat: dict[str, Any], path: Path, fs: DigestingFileSystem, ranks: Ranks) -> None:
    """Write the flat state into the directory `path` through `fs`. Collective.

    When any rank failed: raises this rank's own error, PeerFailed where it has none.
    """
    # One thread: torch loses the exception of every thread but the first.
    writer = FileSystemWriter(path, sync_files=False, thread_count=1, overwrite=False)
    writer.fs = fs
    try:
        with _quiet():
            save(flat, storage_writer=writer, planner=DefaultSavePlanner(), **_of(ranks))
    except CheckpointException as error:
        raise fs.failure or _own_failure(error, ranks.rank) from error


def read_state(flat: dict[str, Any], path: Path, metadata: Metadata, ranks: Ranks) -> None:
    """Fill `flat` from the verified checkpoint `path`: tensors in place, plain values replaced.

    Collective. When any rank failed: raises this rank's own error, PeerFailed where it
    has none.
    """
    try:
        with _quiet():
            load(flat, storage_reader=VerifiedReader(path, metadata), planner=_Planner(), **_of(ranks))
    except CheckpointException as error:
        raise _own_failure(error, ranks.rank) from error


def _of(ranks: Ranks) -> dict[str, Any]:
    return {"no_dist": ranks.size == 1, "process_group": ranks.group}


def _own_failure(error: CheckpointException, rank: int) -> Exception:
    # torch raises one exception on every rank, outside the Exception family, with a page of tracebacks.
    own = error.failures.get(rank)
    if own is None:
        return PeerFailed(f"rank {min(error.failures)} failed")
    return own[0] if isinstance(own[0], Exception) else RuntimeError(repr(own[0]))


@contextmanager
def _quiet() -> Iterator[None]:
    # One process without torch.distributed is a supported way to run, not a thing to warn about.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, KeyPath]]:
    """Leaves of the nested state by dotted key, and the path of each.

    Leaves are tensors, plain values, and lists or tuples of plain values. An empty mapping has none.

    Raises TypeError for another leaf and ValueError for two leaves of one key.
    """
    flat: dict[str, Any] = {}
    paths: dict[str, KeyPath] = {}
    for path, leaf in _leaves((), state):
        key = ".".join(str(part) for part in path)
        if key in flat:
            raise ValueError(f"checkpoint state: two values are named {key}")
        if not isinstance(leaf, torch.Tensor) and not _is_plain(leaf):
            raise TypeError(f"checkpoint state: {key} is neither tensor nor plain but {type(leaf).__name__}")
        flat[key], paths[key] = leaf, path
    return flat, paths


def unflatten_into(state: Mapping[str, Any], flat: Mapping[str, Any], paths: Mapping[str, KeyPath]) -> None:
    """Put the leaves of `flat` back to where `flatten` found them in `state`, in place."""
    for key, leaf in flat.items():
        node: Any = state
        for part in paths[key][:-1]:
            node = node[part]
        node[paths[key][-1]] = leaf


def _leaves(path: KeyPath, node: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves((*path, name), child)
    elif isinstance(node, list) and not _is_plain(node):
        for index, child in enumerate(node):
            yield from _leaves((*path, index), child)
    else:
        yield path, node


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def read_metadata(path: Path, files: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """The torch metadata of checkpoint `path`, unpickled from bytes that have their digest in `files`.

    Raises CheckpointError when the bytes differ, when they name anything but the parts of a metadata
    record, or a file that is not in `files`.
    """
    file = path / METADATA
    raw = file.read_bytes()
    found = xxhash.xxh3_128(raw).hexdigest()
    expected = files[METADATA]["xxh3_128"]
    if found != expected:
        raise CheckpointError(f"{file}: found xxh3_128 {found}, expected {expected}")
    try:
        metadata = cast(Metadata, _MetadataUnpickler(io.BytesIO(raw)).load())
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: {error}") from error
    foreign = {record.relative_path for record in metadata.storage_data.values()} - set(files)
    if foreign:
        raise CheckpointError(f"{file}: names {sorted(foreign)[0]}, which {path}/manifest.json does not list")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """A digest proves that the bytes are those written, not that their writer was honest."""

    _ALLOWED = frozenset(
        [
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            )),
            *((module, name) for module in ("pathlib", "pathlib._local") for name in (
                "Path", "PosixPath", "PurePosixPath",
            )),
        ]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint metadata needs")
        return super().find_class(module, name)
