"""One process at a time owns a run directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from conf.errors import ConfigError, Violation, as_storage_error


class RunLock:
    """Context manager that owns `directory` for as long as this process lives.

    The kernel drops the lock when the process dies, however it dies, so nothing goes stale. Take it
    before anything forks: a forked child keeps the lock alive. `slurm_job_id` only informs the
    process that finds the directory in use.

    Raises ConfigError with key `run.dir` when another process holds it, StorageError when the lock
    file cannot be written.
    """

    def __init__(self, directory: Path, *, slurm_job_id: str | None = None) -> None:
        self.path = directory / "lock"
        self._slurm_job_id = slurm_job_id
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        assert self._descriptor is None, f"{self.path} is already held by this object"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise as_storage_error(error, self.path) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write_holder(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise self._in_use() from error
            raise as_storage_error(error, self.path) from error
        self._descriptor = descriptor
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
        os.close(self._descriptor)
        self._descriptor = None

    def _write_holder(self, descriptor: int) -> None:
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": self._slurm_job_id,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        os.fsync(descriptor)

    def _in_use(self) -> ConfigError:
        holder = _read_holder(self.path)
        job = holder.get("slurm_job_id")
        by = f"pid {holder.get('pid', '?')} on host {holder.get('host', '?')}"
        by += f" (SLURM job {job})" if job else ""
        message = (
            f"{self.path.parent} is in use by {by} since {holder.get('since', '?')}; "
            "wait for it to end or choose another run.dir"
        )
        return ConfigError([Violation("run.dir", message)])


def _read_holder(path: Path) -> dict[str, Any]:
    # The holder may be between taking the lock and writing its name.
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
