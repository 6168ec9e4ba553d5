"""One JSON object per line and step: the record of a run that survives kills and resumes."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.errors import as_storage_error
from train.checkpoint.atomic import write_atomically
from train.track.line_file import LineFile


class MetricsFile(LineFile):
    """A file of lines of which every one has a `step`.

    Where an earlier process wrote, `truncate_after` comes before the first `append`: it may have been
    killed inside a line.
    """

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line of strict JSON and hand it to the system.

        Floats keep every bit; NaN and infinities become null. Raises StorageError as `add`.
        """
        self.add(json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False))

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
