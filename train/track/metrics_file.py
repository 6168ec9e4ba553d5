"""One JSON object per line and step: the record of a run that survives kills and resumes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from conf.errors import as_storage_error
from train.checkpoint.atomic import write_atomically


class MetricsFile:
    """Appends to the file at `path`, which is made on the first line. Every line has a `step`.

    Where an earlier process wrote, `truncate_after` comes before the first `append`: it may have been
    killed inside a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line of strict JSON and hand it to the system.

        Floats keep every bit; NaN and infinities become null. Raises StorageError.
        """
        line = json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            data = line.encode() + b"\n"
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise as_storage_error(error, self.path) from error

    def truncate_after(self, step: int) -> None:
        """Keep only lines of steps up to `step`; a torn last line goes. The rest keeps its bytes.

        Raises StorageError; the file is then untouched.
        """
        self.close()
        kept = [line for line, values in _complete_lines(self.path) if values["step"] <= step]
        if self.path.exists():
            write_atomically(self.path, b"".join(kept))

    def close(self) -> None:
        """Close the file; the next append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the metrics file at `path`, in order, without a torn last one; none if it is missing."""
    return [values for _, values in _complete_lines(path)]


def _complete_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    parsed = []
    for line in lines:
        # Only a kill inside a write leaves a line like this, so it is the last one of its process.
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(values, dict) and isinstance(values.get("step"), int):
            parsed.append((line, values))
    return parsed


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
