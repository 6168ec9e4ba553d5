"""Directories as on the Hugging Face hub: config.json, safetensors shards, their index; a digest beside."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.errors import CheckpointError, as_storage_error
from conf.names import shortened
from conf.tokenizer_files import BESIDE, SENTENCEPIECE, TOKENIZER_DIGEST, TOKENIZER_JSON

T = TypeVar("T")

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# How files of weights end, read or not.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
SHARD_BYTES = 5 * 10**9
# What a tensor may be stored as, in safetensors' words; integers are tables, such as of hashed experts.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
}


class HubDirectory:
    """A checkpoint to read: its config, and which file holds each tensor. Opening it runs no code.

    tokenizer_digest is the sha256 of the tokenizer whose ids it was trained on, None where nothing says it.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for what is missing, truncated or not safetensors."""
        self.path = path
        self.config = _read_json(path / CONFIG)
        self.tokenizer_digest = _read_digest(path / TOKENIZER_DIGEST)
        self.shards = self._shards()
        self._shard_of: dict[str, str] | None = None

    def _shards(self) -> dict[str, list[str]]:
        """Names of the tensors by file; of two forms the single file, as transformers takes it."""
        if (self.path / SINGLE).exists():
            with self._open(SINGLE) as file:
                names = list(file.keys())
            if (self.path / INDEX).exists():
                self._refuse_other_names(set(names), set(self._index()))
            return {SINGLE: names}
        if not (self.path / INDEX).exists():
            raise CheckpointError(self._without_weights())
        shards: dict[str, list[str]] = {}
        for name, file in self._index().items():
            shards.setdefault(file, []).append(name)
        missing = sorted(file for file in shards if not (self.path / file).exists())
        if missing:
            raise CheckpointError(f"{self.path}: missing {', '.join(missing)}; fetch them again")
        return shards

    def _index(self) -> dict[str, str]:
        index = _read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f"{self.path / INDEX}: lacks weight_map; fetch the file again")
        for name, file in index.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{self.path / INDEX}: {name} is said to be in {file!r}")
        return index

    def _refuse_other_names(self, single: set[str], index: set[str]) -> None:
        if single != index:
            found = {SINGLE: single - index, INDEX: index - single}
            alone = (f"only {file} has {shortened(names)}" for file, names in found.items() if names)
            raise CheckpointError(
                f"{self.path}: {SINGLE} and {INDEX} hold different weights: {'; '.join(alone)}; "
                "delete the form that is not meant"
            )

    def _without_weights(self) -> str:
        pickles = sorted(path.name for path in self.path.glob("*.bin")) + sorted(
            path.name for path in self.path.glob("*.pt*")
        )
        if pickles:
            return f"{self.path}: holds {pickles[0]}, a pickle, which can run code; convert it to safetensors"
        return f"{self.path}: holds neither {SINGLE} nor {INDEX}"

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of its tokenizer, by name, and what goes along with them. Raises CheckpointError."""
        try:
            return {
                name: (self.path / name).read_bytes()
                for name in (TOKENIZER_JSON, SENTENCEPIECE, *BESIDE)
                if (self.path / name).is_file()
            }
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot read: {error.strerror}") from error

    def passed_over(self) -> str:
        """A line that names files of weights that are not read; empty when there are none."""
        read = {*self.shards} | ({INDEX} if SINGLE not in self.shards else set())
        found = {path.name for path in self.path.iterdir() if path.name.endswith(_WEIGHTS)} - read
        return f"{self.path}: reads {shortened(read)}; passes over {shortened(found)}" if found else ""

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file}: {error}; fetch the file again") from error

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return {name for names in self.shards.values() for name in names}

    def forms(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor, from the heads of all shards.

        Raises CheckpointError for a truncated shard, or one without its tensors.
        """
        found = {}
        for shard, names in self.shards.items():
            with self._open(shard) as file:
                lost = sorted(set(names) - set(file.keys()))
                if lost:
                    raise CheckpointError(f"{self.path / shard}: lacks {shortened(lost)}; fetch it again")
                for name in names:
                    tensor = file.get_slice(name)
                    found[name] = (tuple(tensor.get_shape()), tensor.get_dtype())
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, one in memory at a time."""
        for shard, names in self.shards.items():
            with self._open(shard) as file:
                for name in names:
                    yield name, file.get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        if self._shard_of is None:
            self._shard_of = {name: shard for shard, names in self.shards.items() for name in names}
        with self._open(self._shard_of[name]) as file:
            return file.get_tensor(name)


def write_directory(
    path: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int,
    tokenizer_digest: str | None = None,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes a checkpoint beside `path` and renames it, one shard in memory at a time.

    files are others by name, such as those of its tokenizer.

    Raises StorageError, and CheckpointError when `path` exists.
    """
    refuse_existing(path)
    beside, shards = beside_of(path), []
    try:
        begin_directory(beside, config, tokenizer_digest, files)
        for shard in shards_of(tensors, lambda tensor: tensor.nbytes, shard_bytes):
            write_shard(beside, len(shards), shard)
            shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        finish_directory(beside, path, shards)
    except OSError as error:
        raise as_storage_error(error, path) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises CheckpointError when `path` exists."""
    if path.exists():
        raise CheckpointError(f"{path}: exists; export to a directory that does not")


def beside_of(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def shards_of(
    items: Iterable[tuple[str, T]], bytes_of: Callable[[T], int], shard_bytes: int
) -> Iterator[dict[str, T]]:
    """Items in the shards that their tensors are written in, in order; a shard has one at least."""
    shard: dict[str, T] = {}
    size = 0
    for name, item in items:
        if shard and size + bytes_of(item) > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = item
        size += bytes_of(item)
    yield shard


def begin_directory(
    beside: Path, config: Mapping[str, Any], tokenizer_digest: str | None, files: Mapping[str, bytes]
) -> None:
    """Makes the directory, with all but weights in it. Raises OSError."""
    beside.mkdir(parents=True)
    for name, content in files.items():
        (beside / name).write_bytes(content)
    (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer_digest is not None:
        # A file and not a field of config.json: families refuse fields that they do not know, and what
        # transformers saves after its embeddings were changed must not keep it.
        (beside / TOKENIZER_DIGEST).write_text(json.dumps({"sha256": tokenizer_digest}) + "\n")


def write_shard(beside: Path, number: int, shard: Mapping[str, Tensor]) -> None:
    """Writes the weights of one shard; shards may come in any order. Raises OSError."""
    path = beside / _shard_name(number)
    save_file({name: x.contiguous() for name, x in shard.items()}, path, metadata={"format": "pt"})
    # It is written for its owner alone; those who may read the config may read the weights.
    path.chmod((beside / CONFIG).stat().st_mode)


def finish_directory(beside: Path, path: Path, shards: Sequence[Mapping[str, int]]) -> None:
    """Names the files, writes their index and renames the directory to `path`. Raises OSError.

    shards has the bytes of each tensor by its name, for each file that was written.
    """
    if len(shards) == 1:
        (beside / _shard_name(0)).rename(beside / SINGLE)
    else:
        weight_map = {}
        for number, sizes in enumerate(shards):
            final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (beside / _shard_name(number)).rename(beside / final)
            weight_map |= dict.fromkeys(sizes, final)
        total = sum(size for sizes in shards for size in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (beside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    beside.rename(path)


def _shard_name(number: int) -> str:
    return f"shard-{number}.safetensors"


def _read_digest(path: Path) -> str | None:
    # Not exists(): a link that leads nowhere would pass for weights that never had a digest.
    if not os.path.lexists(path):
        return None
    digest = _read_json(path).get("sha256")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(f"{path}: sha256 is {digest!r}, expected 64 digits; fetch the file again")
    return digest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(value).__name__}")
    return value
