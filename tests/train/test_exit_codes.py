"""What a launcher reads: the exit codes of docs/checkpoints.md, and a line for everything that is wrong."""

import errno
import os

import pytest

from conf.errors import (
    INTERRUPTED,
    STOPPED,
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    PeerError,
    StorageError,
    Violation,
    exit_on_error,
)

VIOLATIONS = [Violation("optim.lr", "must be above 0; found -1"), Violation("data.workers", "found many")]


def test_signals_have_codes_of_their_own() -> None:
    assert (STOPPED, INTERRUPTED) == (85, 130)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError(VIOLATIONS), 64, ["optim.lr: must be above 0; found -1", "data.workers: found many"]),
        (DataError("file: cut short"), 65, ["file: cut short"]),
        (CheckpointError("none is good"), 66, ["none is good"]),
        (NumericsError("not finite"), 70, ["not finite"]),
        (StorageError("path: cannot write"), 74, ["path: cannot write"]),
        (PeerError("rank 3 ended"), 75, ["rank 3 ended"]),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/file"),
            74,
            ["a/file: cannot write: the disk is full; free space or choose another directory"],
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "a/file"),
            74,
            ["a/file: cannot write: the file system is read-only; choose another directory"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_has_its_code_and_all_of_its_lines(
    error: Exception, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in lines]


def test_what_nobody_can_act_on_keeps_its_traceback() -> None:
    for error in (ValueError("a bug"), OSError(errno.ENOENT, "no such file", "x")):
        with pytest.raises(type(error)), exit_on_error():
            raise error
