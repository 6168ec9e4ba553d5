"""One JSON object per line and step: the record of a run that survives kills and resumes."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from conf.errors import as_storage_error
from train.checkpoint.atomic import write_atomically
from train.checkpoint.transient import FULL, PASSING

# Bytes that may wait for a disk that refuses them: hours of lines.
MOST_WAITING = 32 << 20


class MetricsFile:
    """Appends to the file at `path`, which is made on the first line. Every line has a `step`.

    Where an earlier process wrote, `truncate_after` comes before the first `append`: it may have been
    killed inside a line. Lines that a full or failing disk refuses wait for the next call, with a printed
    line: a checkpoint is worth more than its metrics.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._waiting = bytearray()
        self._is_refused = False

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line of strict JSON and hand it to the system.

        Floats keep every bit; NaN and infinities become null. Raises StorageError where the disk refuses for
        a reason that does not pass by itself, or for too long.
        """
        line = json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False)
        self._waiting += line.encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            self._refuse(error)

    def sync(self) -> None:
        """Make every line durable; a line says where the disk refuses. Raises StorageError as `append`."""
        try:
            self._write()
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._refuse(error)

    def truncate_after(self, step: int) -> int:
        """Keep only lines of steps up to `step`, with their bytes; how many others there were.

        Those, and a torn last line, go to a file beside, `NAME.undone.jsonl`. Raises StorageError; the file
        is then untouched.
        """
        self.close()
        if not self.path.exists():
            return 0
        kept, undone, torn = _split(self.path.read_bytes(), step)
        if undone or torn:
            _append(self.path.with_suffix(".undone.jsonl"), b"".join([*undone, *torn]))
            write_atomically(self.path, b"".join(kept))
        return len(undone)

    def close(self) -> None:
        """Close the file; the next append opens it again. A line says what the disk still refuses."""
        try:
            self._write()
        except OSError as error:
            lines = self._waiting.count(b"\n")
            print(f"{as_storage_error(error, self.path)}; {lines} lines of it are lost", flush=True)
            self._waiting.clear()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        if not self._waiting:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        while self._waiting:
            # What was written of a line stays written: the rest of it comes first next time.
            del self._waiting[: self._file.write(self._waiting)]
        if self._is_refused:
            print(f"{self.path}: written again, nothing is missing", flush=True)
            self._is_refused = False

    def _refuse(self, error: OSError) -> None:
        # A handle of a server that failed over stays stale.
        self._close_file()
        known = as_storage_error(error, self.path)
        if error.errno not in FULL | PASSING or len(self._waiting) > MOST_WAITING:
            raise known from error
        if not self._is_refused:
            print(f"{known}; the run goes on, its lines wait in memory", flush=True)
        self._is_refused = True


def read(path: Path, numbers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The whole lines of the metrics file at `path`, in order; none if it is missing.

    A line is whole where it has an end, a step, and a number or null under each of `numbers`.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [values for line in lines if (values := _values(line, numbers)) is not None]


def _append(path: Path, data: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise as_storage_error(error, path) from error


def _split(whole: bytes, step: int) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Lines up to a step, lines after it, and torn ones, which get an end."""
    kept, undone, torn = [], [], []
    for line in whole.splitlines(keepends=True):
        values = _values(line)
        if values is None:
            torn.append(line.rstrip(b"\n") + b"\n")
        else:
            (kept if values["step"] <= step else undone).append(line)
    return kept, undone, torn


def _values(line: bytes, numbers: Sequence[str] = ()) -> dict[str, Any] | None:
    """What a line holds; None for one that a kill inside a write left, or that is damaged."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(values, dict):
        return None
    found = [values.get(name, "missing") for name in numbers]
    is_whole = type(values.get("step")) is int and all(type(x) in (int, float, type(None)) for x in found)
    return values if is_whole else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
