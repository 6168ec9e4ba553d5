"""The manifest of a checkpoint: which files it has, their sizes and digests, and the run they belong to."""

import errno
import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from conf.errors import CheckpointError, StorageError
from data.durable import sha256_of
from train.checkpoint.transient import PASSING, retried

MANIFEST = "manifest.json"
# Raised whenever a reader of the older number could misread what is written.
FORMAT = 1

_CHUNK_BYTES = 8 << 20


def encode_manifest(fields: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest of `fields`, with its format number and its own digest added.

    Raises TypeError or ValueError when a field is not strict JSON: NaN and infinity are not.
    """
    body = {**fields, "format": FORMAT}
    return _as_json({**body, "sha256": sha256_of(body)})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint directory `path`; its own digest has been verified.

    Raises CheckpointError when the manifest is missing, damaged or of another format.
    """
    manifest, problems = inspect_manifest(path)
    if problems:
        raise CheckpointError("; ".join(problems))
    return manifest


class Inspected(NamedTuple):
    """What is wrong with some files of a checkpoint, a line each; and which of them could not be read.

    unread has what the system said of each, after several tries: it may be the storage and not the file.
    """

    problems: list[str]
    unread: dict[str, str]


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint directory `path`, a line each; empty when it is intact.

    Reads every byte of it and unpickles nothing. Raises CheckpointError for a checkpoint of another
    format, and for one that cannot be read for a reason other than damage; StorageError where the storage
    fails, several times.
    """
    manifest, problems = inspect_manifest(path)
    if problems:
        return problems
    found = inspect_files(path, manifest, manifest["files"])
    for name, said in found.unread.items():
        raise _storage_failed(path / name, said)
    return inspect_entries(path, manifest) + found.problems


def inspect_manifest(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The manifest in directory `path`, and what is wrong with it. Raises as `verify` does."""
    file = path / MANIFEST
    try:
        raw = retried(file.read_bytes)
    except OSError as error:
        return {}, [_unreadable(file, error)]
    try:
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        # Equal bytes, not equal meaning: a flipped bit in white space or in an escape counts too.
        is_as_written = _as_json(manifest) == raw
        expected, found = manifest["sha256"], sha256_of(body)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return {}, [f"{file}: found no manifest ({type(error).__name__}), expected canonical JSON"]
    if found != expected or not is_as_written:
        return {}, [f"{file}: found sha256 {found}, expected {expected}, in canonical JSON"]
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {manifest['format']}, this version reads format {FORMAT}; "
            "use the version that wrote it"
        )
    return manifest, []


def inspect_entries(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names in directory `path` that the manifest does not list, and a wrong step. Raises as `verify`."""
    problems = []
    if path.name.startswith("step_") and path.name.split(".")[0] != step_name(manifest["step"]):
        problems.append(f"{path}: found the manifest of step {manifest['step']}, expected its own")
    try:
        names = sorted(retried(lambda: [entry.name for entry in path.iterdir()]))
    except OSError as error:
        return [*problems, _unreadable(path, error)]
    listed = {*manifest["files"], MANIFEST}
    unlisted = [f"{path / name}: found, expected no such file" for name in names if name not in listed]
    return problems + unlisted


def inspect_files(path: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> Inspected:
    """Files `names` of `path` that are not as the manifest says, and those that could not be read.

    Raises CheckpointError for one that cannot be read for another reason than damage or failing storage.
    """
    found = Inspected([], {})
    for name in names:
        file = path / name
        try:
            problem = retried(lambda name=name: _difference(path, name, manifest["files"][name]))
        except OSError as error:
            if error.errno in PASSING:
                found.unread[name] = error.strerror or str(error)
                continue
            problem = _unreadable(file, error)
        if problem:
            found.problems.append(problem)
    return found


def _difference(path: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """What differs from the manifest's entry of file `name`. Raises OSError."""
    file = path / name
    status = file.lstat()
    # A name with a folder in it would lead out of the checkpoint.
    if Path(name).name != name or not stat.S_ISREG(status.st_mode):
        return f"{file}: found no regular file, expected one"
    if status.st_size != expected["size"]:
        return f"{file}: found {status.st_size} bytes, expected {expected['size']}"
    if (found := digest_file(file)) != expected["xxh3_128"]:
        return f"{file}: found xxh3_128 {found}, expected {expected['xxh3_128']}"
    return None


def digest_file(path: Path) -> str:
    """xxh3_128 of the content of `path`, in hexadecimal. Raises OSError."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def step_name(step: int) -> str:
    """The directory name of the checkpoint of `step`; names sort as steps do."""
    return f"step_{step:08d}"


def _as_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _unreadable(path: Path, error: OSError) -> str:
    if error.errno in PASSING:
        raise _storage_failed(path, error.strerror or str(error)) from error
    # Other failures, such as a lost permission, say nothing about the bytes: they must not condemn them.
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; nothing was set aside") from error
    return f"{path}: found nothing readable ({error.strerror}), expected a file"


def _storage_failed(path: Path, said: str) -> StorageError:
    return StorageError(
        f"{path}: cannot be read, in several tries: {said}; nothing was set aside; if it stays, move it away"
    )
