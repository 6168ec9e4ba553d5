"""What stands in the checkpoints directory of a run, told apart by name and kind."""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from conf.errors import CheckpointError, ConfigError, Violation, as_storage_error
from train.checkpoint.manifest import MANIFEST, step_name
from train.checkpoint.transient import PASSING, retried

_COMMITTED = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.(tmp|deleting|replaced)")
_SET_ASIDE = re.compile(r"step_\d{8,}\.corrupt(\.\d+)?")


class Entries(NamedTuple):
    """Committed checkpoints by step, newest first, and names of what else may be one.

    unreadable has a line for each that is named as a checkpoint and cannot be opened. unnamed look like
    checkpoints, by the beginning of their names or by a manifest, and are not named as one.
    """

    steps: list[int]
    unreadable: list[str]
    leftovers: list[str]
    set_aside: list[str]
    unnamed: list[str]

    def passed_over(self) -> list[str]:
        """A line for each that is not read, with the reason."""
        earlier = [f"{name}: set aside by an earlier start" for name in self.set_aside]
        return earlier + [f"{name}: not named as a checkpoint is (step_00000012)" for name in self.unnamed]


def list_entries(directory: Path) -> Entries:
    """The entries of `directory`, links followed; nothing is verified, and what is not there is empty.

    Raises CheckpointError for a directory that is there and may not be listed, StorageError where storage
    fails, several times.
    """
    found = Entries([], [], [], [], [])
    for path in _paths(directory):
        if match := _COMMITTED.fullmatch(path.name):
            if problem := _unopenable(path):
                found.unreadable.append(f"{path.name}: {problem}")
            elif path.is_dir():  # another process may have deleted it since it was listed
                found.steps.append(int(match[1]))
        elif _LEFTOVER.fullmatch(path.name) and path.is_dir():
            found.leftovers.append(path.name)
        elif _SET_ASIDE.fullmatch(path.name):
            found.set_aside.append(path.name)
        elif os.path.exists(path / MANIFEST) or (path.name.startswith("step_") and os.path.lexists(path)):
            found.unnamed.append(path.name)
    found.steps.sort(reverse=True)
    return found


def refuse_unknown_step(directory: Path, step: int, found: Entries) -> None:
    """Raises ConfigError, with the steps that there are, where `directory` has no checkpoint of `step`."""
    name = step_name(step)
    if step in found.steps:
        return
    lines = [line for line in (*found.unreadable, *found.passed_over()) if line.startswith(name)]
    there = ", ".join(map(str, sorted(found.steps)))
    has = f"there are {there}; give one of them" if there else "there is none yet; wait for the first save"
    why = f" ({'; '.join(lines)})" if lines else ""
    raise ConfigError([Violation("step", f"{directory} has no checkpoint of step {step}{why}; {has}")])


def remove(path: Path) -> str:
    """Deletes a checkpoint; of a link the link alone, and then says where the rest stays. Raises OSError."""
    if path.is_symlink():
        kept = f"{path.resolve()} stays: only a link to it was deleted"
        path.unlink()
        return kept
    shutil.rmtree(path)
    return ""


def _paths(directory: Path) -> list[Path]:
    try:
        return sorted(retried(lambda: list(directory.iterdir())))
    except OSError as error:
        if error.errno in PASSING:
            raise as_storage_error(error, directory, "list") from error
        if isinstance(error, FileNotFoundError) and not directory.is_symlink():
            return []
        raise CheckpointError(
            f"{directory}: checkpoints cannot be listed: {error.strerror}; make it a directory, or a link to "
            "one, that can be read; or move it away to start anew"
        ) from error


def _unopenable(path: Path) -> str:
    """Why a checkpoint cannot be opened; empty when it can, or is no longer there."""
    try:
        os.close(retried(lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY)))
    except FileNotFoundError:
        return f"a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
    except NotADirectoryError:
        return "no directory"
    except OSError as error:
        if error.errno in PASSING:
            raise as_storage_error(error, path, "open") from error
        return f"cannot be opened: {error.strerror}"
    return ""
