"""Errors that a user can act on, each with the exit code that tells a launcher what to do next."""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

# Saved on request before the end: no error, and no success after which what stands behind && may start.
STOPPED = 85
# Ended by SIGINT, as a shell counts it.
INTERRUPTED = 130


class WeftError(Exception):
    """A failure with a one-line cause and fix. Subclasses set the process exit code."""

    exit_code = 70


class Violation(NamedTuple):
    """One thing wrong with a config: the key as typed, and what to change."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class ConfigError(WeftError):
    """A config that cannot run. Carries every violation found. Never requeue."""

    exit_code = 64

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("\n".join(str(violation) for violation in self.violations))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[Violation, ...]]]:
        # Exceptions are made again from their text, also those that another process raised.
        return type(self), (self.violations,)


class DataError(WeftError):
    """Token files, tokenizers or documents that cannot be used as they are. Never requeue."""

    exit_code = 65


class CheckpointError(WeftError):
    """No checkpoint of the run can be used. Never requeue."""

    exit_code = 66


class NumericsError(WeftError):
    """Training gave non-finite values and was stopped before they reached the weights."""

    exit_code = 70


class StorageError(WeftError):
    """A file could not be written or read: full, read-only or failing storage. Requeue with backoff."""

    exit_code = 74


class PeerError(WeftError):
    """Another process of the run never came, ended or hangs. Requeue."""

    exit_code = 75


_STORAGE_CAUSES = {
    errno.ENOSPC: "the disk is full; free space or choose another directory",
    errno.EDQUOT: "the quota is used up; free space or choose another directory",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.EACCES: "permission denied; choose a directory that this user may write",
    errno.EPERM: "permission denied; choose a directory that this user may write",
}


def as_storage_error(error: OSError, path: str | os.PathLike[str], action: str = "write") -> StorageError:
    """The StorageError that names `path`, what could not be done, what the system said, and the fix."""
    cause = _STORAGE_CAUSES.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"{os.fspath(path)}: cannot {action}: {cause}")


def as_weft_error(error: BaseException) -> WeftError | None:
    """The error as one that a user can act on; None where it is of another kind."""
    if isinstance(error, WeftError):
        return error
    if isinstance(error, OSError) and error.errno in _STORAGE_CAUSES:
        return as_storage_error(error, error.filename or "(unnamed file)")
    return None


def leave(error: WeftError) -> NoReturn:
    """Ends the process at once, whatever its other threads are at, with the error's line and exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a WeftError, or a full or read-only disk, into lines on stderr and its exit code.

    Raises SystemExit instead; every other exception passes through with its traceback.
    """
    try:
        yield
    except Exception as error:
        known = as_weft_error(error)
        if known is None:
            raise
        lines = known.violations if isinstance(known, ConfigError) else [known]
        _exit([str(line) for line in lines], known.exit_code)


def _exit(lines: Sequence[str], code: int) -> NoReturn:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)
