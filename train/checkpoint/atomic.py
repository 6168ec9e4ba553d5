"""Files and directory entries that survive a crash: either the old content or the new, never a mixture."""

import contextlib
import errno
import os
import threading
from pathlib import Path

from conf.errors import as_storage_error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, on disk and durable when this returns.

    The old file stays readable until the new one is complete. The directory must exist. A kill can
    leave a hidden `.NAME.*.tmp` beside it.

    Raises StorageError; the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise as_storage_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Create or overwrite `path` with `data` and fsync it. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> bool:
    """Make created, renamed and deleted entries of the directory `path` durable.

    False where the file system has no such thing. Raises OSError where it fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        os.close(descriptor)
    return True
