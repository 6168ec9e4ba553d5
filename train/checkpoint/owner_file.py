"""Ownership of a path on file systems without flock: a file made exclusively, with a heartbeat in it."""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import PeerError, leave

# Seconds between two beats, and those after which an owner that shows none is dead.
INTERVAL, SILENCE = 5.0, 30.0


class OwnerFile:
    """Owns `path` from `take` to `release`. A thread of it beats into the file.

    Where another process takes the path over all the same, because this one did not come to beat for so long,
    this process ends at once with PeerError's code: two owners would overwrite each other's checkpoints.
    """

    def __init__(self, path: Path, interval: float = INTERVAL, silence: float = SILENCE) -> None:
        self.path, self._interval, self._silence = path, interval, silence
        self._descriptor: int | None = None
        self._holder: dict[str, Any] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def take(self, holder: Mapping[str, Any]) -> dict[str, Any] | None:
        """None once the path is ours; else the holder that another process gave and still beats for.

        Waits for a silent owner's time to pass. Raises OSError.
        """
        self._holder = dict(holder)
        while True:
            try:
                self._descriptor = os.open(
                    self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
                )
            except FileExistsError:
                found = self._bury()
                if found is not None:
                    return found
                continue
            self._beat(0)
            self._thread.start()
            return None

    def release(self) -> None:
        """Gives the path up, where it is held."""
        if self._descriptor is None:
            return
        self._is_over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _bury(self) -> dict[str, Any] | None:
        """Moves a dead owner's file away; the holder where the owner lives.

        What cannot be read is watched as long as what can: its owner may be about to write it.
        """
        first = self._read()
        deadline = time.monotonic() + self._silence
        while not _is_dead_here(_holder_of(first)) and time.monotonic() < deadline:
            time.sleep(self._interval / 5)
            if (now := self._read()) != first:
                return None if now is None else _holder_of(now)
        grave = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        try:
            self.path.rename(grave)
        except FileNotFoundError:
            return None
        try:
            if (buried := grave.read_bytes()) == first:
                return None
            # Another process was faster, and this is its file: it gets it back.
            with contextlib.suppress(FileExistsError):
                os.link(grave, self.path)
            return _holder_of(buried)
        finally:
            grave.unlink()

    def _read(self) -> bytes | None:
        """What the file holds; None where it is gone."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _run(self) -> None:
        beat = 0
        while not self._is_over.wait(self._interval):
            beat += 1
            # A beat that storage refuses is not the end: others wait for several.
            with contextlib.suppress(OSError):
                if not self._is_ours():
                    leave(PeerError(f"{self.path}: another process took it over; this one ends"))
                self._beat(beat)

    def _is_ours(self) -> bool:
        assert self._descriptor is not None, "it runs while the path is held"
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _beat(self, beat: int) -> None:
        assert self._descriptor is not None, "it runs while the path is held"
        # Of one length, so that a reader never sees the end of an older one.
        os.pwrite(self._descriptor, json.dumps({**self._holder, "beat": f"{beat:012d}"}).encode(), 0)
        os.fsync(self._descriptor)


def _holder_of(content: bytes | None) -> dict[str, Any]:
    """What the owner wrote of itself, empty where that is not complete."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead_here(holder: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    pid = holder.get("pid")
    if holder.get("host") != os.uname().nodename or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
