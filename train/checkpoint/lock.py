"""One process at a time owns a run directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from conf.errors import ConfigError, PeerError, Violation, as_storage_error
from train.checkpoint.atomic import sync_directory
from train.checkpoint.owner_file import OwnerFile
from train.checkpoint.transient import retried

_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Seconds that a file server may take to drop the lock of a machine that is gone.
_LINGERS = 90.0


class RunLock:
    """Context manager that owns `directory` for as long as this process lives.

    The kernel drops the lock when the process dies, however it dies, so nothing goes stale. Take it
    before anything forks: a forked child keeps the lock alive. Where the file system has no flock, or
    cannot sync a directory, a line says so; the lock is then a file `lock.owner` with a heartbeat.

    `slurm_job_id` is told to a process that finds the directory in use. One of the same job waits up to
    `lingers` seconds: a job that was requeued finds the lock of a machine that is gone.

    Raises ConfigError with key `run.dir` when another process holds it, PeerError when one of the same job
    does so for too long, StorageError when the lock file cannot be written.
    """

    def __init__(
        self, directory: Path, *, slurm_job_id: str | None = None, lingers: float = _LINGERS
    ) -> None:
        self.path = directory / "lock"
        self._slurm_job_id, self._lingers = slurm_job_id, lingers
        self._descriptor: int | None = None
        self._owner: OwnerFile | None = None

    def __enter__(self) -> "RunLock":
        assert self._descriptor is None, f"{self.path} is already held by this object"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._take(self._descriptor)
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise as_storage_error(error, self.path) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._descriptor is not None, f"{self.path} is not held"
        # The file stays: unlinking it would let two processes lock two different files of one name.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        self._close()

    def _close(self) -> None:
        if self._owner is not None:
            self._owner.release()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._owner = None

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + self._lingers
        while (holder := self._try(descriptor)) is not None:
            of_same_job = self._slurm_job_id is not None and holder.get("slurm_job_id") == self._slurm_job_id
            if not of_same_job:
                raise self._in_use(holder)
            if time.monotonic() > deadline:
                raise PeerError(
                    f"{self._said(holder)}, a process of this job that is not gone yet; nothing came of "
                    f"waiting {self._lingers:g} s for it to end"
                )
            time.sleep(min(1.0, self._lingers / 10))
        self._write_holder(descriptor)
        if not sync_directory(self.path.parent):
            print(
                f"{self.path.parent}: this file system cannot sync a directory; a power cut may undo the "
                "newest renames, and with them a checkpoint that was said to be saved",
                flush=True,
            )

    def _try(self, descriptor: int) -> dict[str, Any] | None:
        """None once the lock is ours, else its holder. Raises OSError."""
        try:
            retried(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            return _read_holder(self.path)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            if self._owner is None:
                self._owner = OwnerFile(self.path.with_name("lock.owner"))
                print(
                    f"{self.path.parent}: this file system has no flock ({error.strerror}); lock.owner and "
                    "its heartbeat are the lock",
                    flush=True,
                )
            return self._owner.take(self._holder())
        return None

    def _holder(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": self._slurm_job_id,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _write_holder(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(self._holder()).encode(), 0)
        os.fsync(descriptor)

    def _said(self, holder: dict[str, Any]) -> str:
        job = holder.get("slurm_job_id")
        by = f"pid {holder.get('pid', '?')} on host {holder.get('host', '?')}"
        by += f" (SLURM job {job})" if job else ""
        return f"{self.path.parent} is in use by {by} since {holder.get('since', '?')}"

    def _in_use(self, holder: dict[str, Any]) -> ConfigError:
        message = f"{self._said(holder)}; wait for it to end or choose another run.dir"
        return ConfigError([Violation("run.dir", message)])


def _read_holder(path: Path) -> dict[str, Any]:
    # The holder may be between taking the lock and writing its name.
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
