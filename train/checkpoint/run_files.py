"""What a run directory says of its run: config, identity and how far it came; read back also when damaged.

`config.json` and `run.json` have a copy in the manifest of every checkpoint.
"""

import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import CheckpointError, StorageError
from train.checkpoint.entries import Entries, list_entries
from train.checkpoint.manifest import inspect_manifest, step_name
from train.checkpoint.records import read_record, write_record

CONFIG_FILE, RUN_FILE, CHECKPOINTS = "config.json", "run.json", "checkpoints"
# Under this key the manifest of a checkpoint has the copy.
COPY = "run"


class Identity(NamedTuple):
    """A run's id, and the step of the newest checkpoint that it committed."""

    id: str
    step: int


class RunFiles:
    """The two files of a claimed run. Rank 0 alone writes them."""

    def __init__(self, directory: Path, config: Mapping[str, Any], identity: Identity) -> None:
        self.directory, self.config, self.id = directory, dict(config), identity.id

    def copy(self) -> dict[str, Any]:
        """What the manifest of a checkpoint has of them."""
        return {"id": self.id, "config": self.config}

    def write_step(self, step: int) -> None:
        """Notes that the checkpoint of `step` is committed: no later start may begin before it unasked.

        Where the disk refuses, a line says so: the checkpoint itself is safe.
        """
        try:
            write_record(self.directory / RUN_FILE, Identity(self.id, step)._asdict())
        except StorageError as error:
            print(f"{error}; that the run reached step {step} stands in its checkpoint alone", flush=True)


def read_config(directory: Path) -> dict[str, Any] | None:
    """The config that the run was started with; None where there is no run.

    A missing or damaged file is replaced by its copy in the newest checkpoint, with a line that says so.
    Raises CheckpointError where there is a run, but no copy.
    """
    return _read(directory, CONFIG_FILE, lambda manifest: manifest["extra"][COPY]["config"])


def read_identity(directory: Path) -> Identity | None:
    """Id and newest step of the run; None where `run.json` is not there.

    A damaged file is replaced by its copy in the newest checkpoint, with a line that says so. Raises
    CheckpointError where there is none.
    """
    path = directory / RUN_FILE
    if not path.exists():
        return None
    fields = _read(
        directory,
        RUN_FILE,
        lambda manifest: {"id": manifest["extra"][COPY]["id"], "step": manifest["step"]},
    )
    assert fields is not None, "it exists"
    # Versions before 2026-11-29 wrote no step.
    return Identity(str(fields["id"]), int(fields["step"]) if "step" in fields else newest_step(directory))


def new_identity(directory: Path) -> Identity:
    """A new id for what is there."""
    return Identity(uuid.uuid4().hex[:12], newest_step(directory))


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint that a start would look at, 0 without any."""
    return max(_steps(list_entries(directory / CHECKPOINTS)), default=0)


def refuse_lost_progress(directory: Path, reached: int, accept_step: int | None) -> None:
    """Raises CheckpointError where the run had committed a later checkpoint than any that is there.

    One that was set aside for damage is there. accept_step is the step that the user takes instead.
    """
    found = list_entries(directory / CHECKPOINTS)
    newest = max(_steps(found), default=0)
    if found.unreadable or newest >= reached or newest == accept_step:
        return
    if any(name.startswith(step_name(reached)) for name in found.set_aside):
        return
    has = f"its newest is of step {newest}" if newest else "holds none that is named as a checkpoint is"
    raise CheckpointError(
        f"{directory / CHECKPOINTS}: the run had saved step {reached}, and {has}; put back what is missing "
        f"(a disk that is not mounted, a folder that was moved), or set checkpoint.accept_step={newest} to "
        f"do the steps from {newest} again"
    )


def _steps(found: Entries) -> list[int]:
    # A start puts back what an interrupted replacement hid.
    hidden = [name for name in found.leftovers if name.endswith(".replaced")]
    return [*found.steps, *(int(name.split(".")[0].removeprefix("step_")) for name in hidden)]


def _read(
    directory: Path, name: str, of_manifest: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    problem = f"{directory / name}: not there"
    try:
        fields = read_record(directory / name)
    except CheckpointError as error:
        fields, problem = None, str(error)
    if fields is not None:
        return fields
    found = list_entries(directory / CHECKPOINTS)
    for step in found.steps:
        manifest, problems = inspect_manifest(directory / CHECKPOINTS / step_name(step))
        if not problems and COPY in manifest["extra"]:
            # Not among the output, which some commands give to a program.
            print(f"{problem}; taken from the copy in {step_name(step)}", file=sys.stderr, flush=True)
            return of_manifest(manifest)
    if not found.steps and not found.unreadable and not (directory / name).exists():
        return None
    raise CheckpointError(f"{problem}, and no checkpoint has a copy; put it back, or choose another run.dir")
