"""Ownership of a path on file systems without flock: a file made exclusively, with a heartbeat in it."""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import PeerError

# Seconds between two beats, and those after which an owner that shows none is dead.
INTERVAL, SILENCE = 5.0, 30.0


class OwnerFile:
    """Owns `path` from `take` to `release`. Its thread beats into the file meanwhile.

    Where another process takes the path over all the same, because this one did not come to beat for so long,
    this process ends at once with PeerError's code: two owners would overwrite each other's checkpoints.
    """

    def __init__(self, path: Path, interval: float = INTERVAL, silence: float = SILENCE) -> None:
        self.path, self._interval, self._silence = path, interval, silence
        self._descriptor: int | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def take(self, holder: Mapping[str, Any]) -> dict[str, Any] | None:
        """None once the path is ours; else the holder that another process gave and still beats for.

        Waits for a silent owner's time to pass. Raises OSError.
        """
        self._content = {**holder, "token": uuid.uuid4().hex}
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
        """Gives the path up. Mutates the directory."""
        assert self._descriptor is not None, f"{self.path} is not held"
        self._is_over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _bury(self) -> dict[str, Any] | None:
        """Moves a dead owner's file away; the holder where the owner lives."""
        first = self._read()
        deadline = time.monotonic() + self._silence
        while first is not None and not _is_dead_here(first) and time.monotonic() < deadline:
            time.sleep(self._interval / 5)
            if (now := self._read()) != first:
                return now
        grave = self.path.with_name(f"{self.path.name}.{self._content['token']}")
        try:
            self.path.rename(grave)
        except FileNotFoundError:
            return None
        try:
            buried = json.loads(grave.read_bytes() or b"{}")
            if buried == first or (first is None and not buried):
                return None
            # Another process was faster, and this is its file: it gets it back.
            with contextlib.suppress(FileExistsError):
                os.link(grave, self.path)
            return buried
        finally:
            grave.unlink()

    def _read(self) -> dict[str, Any] | None:
        """What the owner wrote last; None where there is nothing (yet)."""
        try:
            found = json.loads(self.path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _run(self) -> None:
        beat = 0
        while not self._is_over.wait(self._interval):
            beat += 1
            # A beat that storage refuses is not the end: others wait for several.
            with contextlib.suppress(OSError):
                if not self._is_ours():
                    _leave(f"{self.path}: another process took the run directory over; this one ends")
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
        os.pwrite(self._descriptor, json.dumps({**self._content, "beat": f"{beat:012d}"}).encode(), 0)
        os.fsync(self._descriptor)


def _is_dead_here(holder: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    pid = holder.get("pid")
    if holder.get("host") != os.uname().nodename or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _leave(said: str) -> None:
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(PeerError.exit_code)
