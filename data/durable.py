"""Files that outlive a crash: written beside, synced and renamed; an error always names the file."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import xxhash

_READ_BYTES = 4 << 20


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` all at once: a failure leaves what was there before.

    Raises OSError with the path.
    """
    # A worker that outlives its parent for a moment must not share a file with its successor.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with named(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, outlive a crash of the machine. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """xxh3_128 of a file, as hex. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an OSError that passes through the file that it is about, if it has none.

    The system names a file that it cannot open, but not one that it cannot write to.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sha256_of(body: Mapping[str, Any]) -> str:
    """sha256 of plain JSON fields, in hexadecimal, whatever their order and layout in a file.

    Raises ValueError for a number that is not finite.
    """
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def refuse_not_finite(name: str) -> NoReturn:
    """For json.loads, as its parse_constant: no file of ours holds NaN or an infinity. Raises ValueError."""
    raise ValueError(f"{name} is no number of JSON")
