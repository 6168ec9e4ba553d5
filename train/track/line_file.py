"""A file to which a run adds lines, and which may wait for its disk."""

import os
from pathlib import Path
from typing import IO

from conf.errors import as_storage_error
from train.checkpoint.transient import FULL, PASSING

# Bytes that may wait for a disk that refuses them: hours of lines.
MOST_WAITING = 32 << 20


class LineFile:
    """Appends to the file at `path`, which is made on the first line.

    Lines that a full or failing disk refuses wait for the next call, with a printed line: a checkpoint is
    worth more than what is told of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._waiting = bytearray()
        self._is_refused = False

    def add(self, line: str) -> None:
        """Hand a line, given without its end, to the system.

        Raises StorageError where the disk refuses for a reason that does not pass by itself, or for too long.
        """
        self._waiting += line.encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            self._refuse(error)

    def sync(self) -> None:
        """Make every line durable; a line says where the disk refuses. Raises StorageError as `add`."""
        try:
            self._write()
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._refuse(error)

    def close(self) -> None:
        """Close the file; the next line opens it again. A printed line says what the disk still refuses."""
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
