"""Checkpoints that are either committed and verified or not there, with fallback to the newest good one."""

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from conf.errors import CheckpointError, StorageError
from train.checkpoint.atomic import sync_directory, write_durably
from train.checkpoint.entries import Entries, list_entries, refuse_unknown_step, remove
from train.checkpoint.manifest import (
    MANIFEST,
    encode_manifest,
    inspect_entries,
    inspect_files,
    inspect_manifest,
    read_manifest,
    step_name,
    verify,
)
from train.checkpoint.ranks import Ranks
from train.checkpoint.run_files import COPY, RunFiles
from train.checkpoint.storage import (
    DigestingFileSystem,
    KeyPath,
    flatten,
    read_metadata,
    read_state,
    unflatten_into,
    write_state,
)
from train.checkpoint.tensor_reader import TensorReader

__all__ = ["CheckpointStore", "Loaded", "read_manifest", "verify"]

# Enough of a list to see what went wrong; the rest is counted.
_SHOWN_KEYS = 10


class Loaded(NamedTuple):
    """What `load_latest` found.

    `extra` is what `save` was given. `set_aside` has a line for each newer checkpoint that was bad,
    `skipped` the optional keys of this rank's state that the checkpoint does not have.
    """

    step: int
    extra: dict[str, Any]
    path: Path
    set_aside: list[str]
    skipped: list[str]


class Opened(NamedTuple):
    """A checkpoint to read single tensors of; step, extra and path as in `Loaded`."""

    step: int
    extra: dict[str, Any]
    path: Path
    reader: TensorReader


class _Compared(NamedTuple):
    """What a checkpoint says of itself, and the leaves of the state that it was compared with."""

    manifest: dict[str, Any]
    metadata: Metadata
    flat: dict[str, Any]
    paths: dict[str, KeyPath]


class CheckpointStore:
    """The checkpoints of one run, under `directory`, shared by all ranks.

    `directory` must be on storage that every rank sees. `keep` is how many of the newest verified
    checkpoints stay, at least 2. `run_files` of rank 0 have a copy in each manifest and learn of each commit.
    With `size` above 1 every method but `candidates` is collective over `group`, or the default one; with 1
    no group is needed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        run_files: RunFiles | None = None,
    ) -> None:
        assert keep >= 2, f"{keep=}"
        assert 0 <= rank < size, f"{rank=} {size=}"
        self.directory = directory
        self.keep = keep
        self._ranks = Ranks(rank, size, group)
        self._verified: set[int] = set()
        # Of the files of the last checkpoint that this process took part in.
        self.saved_bytes = 0
        self._run_files = run_files

    def save(self, step: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> Path:
        """Write and commit the checkpoint of `step`; returns its directory.

        `state` is nested mappings of tensors, DTensors and plain values; keys may differ between ranks.
        `extra` is strict JSON, and rank 0's counts. A checkpoint of the same step is replaced once the
        new one is complete. Then all but the newest `keep` verified ones are deleted.

        Raises StorageError on every rank when one could not write; earlier checkpoints are then as they
        were. Raises RuntimeError for a state or an extra that cannot be stored.
        """
        final = self.directory / step_name(step)
        temporary = final.with_name(final.name + ".tmp")
        action = f"{final}: checkpoint not saved"
        if self._run_files is not None:
            extra = {**extra, COPY: self._run_files.copy()}
        try:
            flat: dict[str, Any] = {}
            # Before the collective write: a rank that refuses its state there would leave the others waiting.
            self._ranks.together(action, lambda: flat.update(flatten(state)[0]))
            self._ranks.on_first(action, lambda: self._prepare(temporary, step, extra))
            written = self._ranks.together(action, lambda: self._write(temporary, flat))
            files = {name: entry for entries in written for name, entry in entries.items()}
            self.saved_bytes = sum(entry["size"] for entry in files.values())
            self._ranks.on_first(action, lambda: self._commit(temporary, final, step, files, extra))
        except Exception:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self._run_files is not None:
            self._run_files.write_step(step)
        self._verified.discard(step)
        self._retain(step)
        return final

    def probe(self, planned_bytes: int) -> None:
        """Writes, renames and deletes a file as a save does, on every rank. Collective.

        Raises StorageError where that fails, or where there is less room than for a checkpoint of so many
        bytes: else it would show at the first save, hours later.
        """

        def write() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Names that the next start uses too: what a kill leaves here does not stay.
            path = self.directory / f".probe.{self._ranks.rank}"
            renamed = path.with_name(f"{path.name}.renamed")
            write_durably(path, b"a save can write here\n")
            path.rename(renamed)
            renamed.unlink()
            room = os.statvfs(self.directory)
            free = room.f_bavail * room.f_frsize
            if free < planned_bytes:
                raise StorageError(
                    f"{free / 2**30:,.1f} GiB are free, a checkpoint needs {planned_bytes / 2**30:,.1f} (the "
                    "older ones stay until it is complete); free space, or choose another run.dir"
                )

        self._ranks.together(f"{self.directory}: no checkpoint can be saved", write)

    def candidates(self) -> list[int]:
        """Steps of the committed checkpoints, newest first; none of them is verified."""
        return list_entries(self.directory).steps

    def load_latest(
        self,
        state: Mapping[str, Any],
        *,
        partial: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        read_only: bool = False,
        step: int | None = None,
    ) -> Loaded | None:
        """Load the newest intact checkpoint into `state`, in place; None when the run has none.

        With a `step` it is the checkpoint of that step and no other.

        Nothing is unpickled before the digests of the whole checkpoint agree. A bad checkpoint is
        renamed to `step_X.corrupt`, with a printed line, and the next older one is tried. A line names what
        looks like a checkpoint and is passed over. Leftovers of interrupted saves are removed. With
        `read_only` nothing is renamed or removed, so that another process may own the run.

        Every key of `state` must be stored with the same shape and dtype, and the reverse. `partial`
        waives the reverse for stored keys outside these dotted prefixes. `optional` waives both ways for
        keys under its prefixes, such as the random state of a rank that another world size lacks; what is
        not stored keeps its value and is listed in `skipped`.

        Raises CheckpointError when one cannot be opened, when there is anything that looks like a checkpoint
        and none is usable, when the keys differ, and when that of `step` is damaged.
        Raises ConfigError where there is none of `step`.
        """
        if not read_only:
            self._ranks.on_first("checkpoints not swept", self._sweep)
        found = self._find(step, read_only)
        return None if found is None else self._read(*found, state, partial, optional)

    @contextmanager
    def open_tensors(
        self, state: Mapping[str, Any], *, partial: tuple[str, ...], step: int | None = None
    ) -> Iterator[Opened | None]:
        """An intact checkpoint, chosen and compared with `state` as `load_latest` does with `read_only`.

        Nothing is loaded, so `state` may be on the meta device. Raises as `load_latest` does.
        """
        found = self._find(step, read_only=True)
        if found is None:
            yield None
            return
        path, _ = found
        manifest, metadata, _, _ = self._compare(path, state, partial, ())
        with ExitStack() as files:
            reader = TensorReader(path, metadata)

            def enter() -> None:
                files.enter_context(reader)

            self._ranks.together(f"{path} not opened", enter)
            yield Opened(manifest["step"], manifest["extra"], path, reader)

    def _find(self, step: int | None, read_only: bool) -> tuple[Path, list[str]] | None:
        """The newest intact checkpoint, or that of `step`, and a line for each newer one that is bad.

        Collective. Raises as `load_latest` does.
        """
        if step is not None:
            refuse_unknown_step(self.directory, step, self._entries())
            path = self.directory / step_name(step)
            if problems := self._problems(path):
                raise CheckpointError(
                    f"{path}: damaged: {_shortened(problems, 3)}; no other one is taken in its place; give "
                    "another step, or leave step out for the newest one that is good"
                )
            return path, []
        found = self._list()
        set_aside: list[str] = []
        for each in found.steps:
            path = self.directory / step_name(each)
            problems = self._problems(path)
            if not problems:
                self._verified.add(each)
                self._name_passed_over(found)
                return path, set_aside
            set_aside.append(self._reject(path, problems, read_only))
        # A requeued run must not start from nothing because the run before it set everything aside.
        if bad := set_aside + found.passed_over():
            raise CheckpointError(
                f"{self.directory}: no checkpoint is usable; restore one, or move these away to start anew: "
                + " | ".join(bad)
            )
        return None

    def _open_file_system(self) -> DigestingFileSystem:
        return DigestingFileSystem()

    def _entries(self) -> Entries:
        """What is there, as rank 0 sees it. Collective."""
        listed = self._ranks.on_first(
            "checkpoints not listed", lambda: list_entries(self.directory)._asdict()
        )
        return Entries(**listed)

    def _list(self) -> Entries:
        """The same. Collective. Raises CheckpointError for what cannot be opened."""
        found = self._entries()
        if found.unreadable:
            # It may be the newest one: to go on from an older one could lose what it holds.
            raise CheckpointError(
                f"{self.directory}: cannot open {_shortened(found.unreadable, _SHOWN_KEYS)}; "
                "put back what was there, or move it away to go on without"
            )
        return found

    def _name_passed_over(self, found: Entries) -> None:
        lines = found.passed_over()
        if lines and self._ranks.rank == 0:
            print(f"{self.directory}: passed over {_shortened(lines, _SHOWN_KEYS)}", flush=True)

    def _prepare(self, temporary: Path, step: int, extra: Mapping[str, Any]) -> None:
        # An extra that JSON refuses must fail before the expensive part.
        encode_manifest({"step": step, "extra": dict(extra)})
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        temporary.mkdir()

    def _write(self, temporary: Path, flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
        fs = self._open_file_system()
        write_state(flat, temporary, fs, self._ranks)
        return fs.entries

    def _commit(
        self,
        temporary: Path,
        final: Path,
        step: int,
        files: Mapping[str, Mapping[str, Any]],
        extra: Mapping[str, Any],
    ) -> None:
        manifest = encode_manifest(
            {
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "extra": dict(extra),
                "files": dict(files),
                "step": step,
                "torch": str(torch.__version__),
                "world_size": self._ranks.size,
            }
        )
        write_durably(temporary / MANIFEST, manifest)
        sync_directory(temporary)
        replaced = final.with_name(final.name + ".replaced")
        if os.path.lexists(final):
            # A kill between the two renames leaves the old one as .replaced; the sweep puts it back.
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if os.path.lexists(replaced):
                replaced.rename(final)
            raise
        sync_directory(self.directory)
        if os.path.lexists(replaced):
            remove(replaced)

    def _sweep(self) -> None:
        """Remove what interrupted saves and deletions left; restore what an interrupted replacement hid."""
        for name in list_entries(self.directory).leftovers:
            path = self.directory / name
            committed = path.with_suffix("")
            if path.suffix == ".replaced" and not os.path.lexists(committed):
                path.rename(committed)
            else:
                remove(path)

    def _problems(self, path: Path) -> list[str]:
        """What any rank finds wrong with `path`, the files shared out over the ranks. Collective."""

        def inspect() -> dict[str, Any]:
            manifest, problems = inspect_manifest(path)
            if problems:
                return {"problems": problems, "unread": {}, "files": 0}
            rank, size, _ = self._ranks
            # By size, so that equal shards go to different ranks.
            names = sorted(manifest["files"], key=lambda name: (manifest["files"][name]["size"], name))
            found = inspect_files(path, manifest, names[rank::size])
            problems = inspect_entries(path, manifest) + found.problems
            return {"problems": problems, "unread": found.unread, "files": len(names)}

        reports = self._ranks.together(f"{path} not verified", inspect)
        problems = [problem for report in reports for problem in report["problems"]]
        unread = [(name, owner) for owner, report in enumerate(reports) for name in report["unread"]]
        if unread and not problems:
            problems = self._read_elsewhere(path, unread, reports[0]["files"])
        return list(dict.fromkeys(problems))

    def _read_elsewhere(self, path: Path, unread: list[tuple[str, int]], files: int) -> list[str]:
        """What is wrong with files that a rank could not read, as the next rank finds them. Collective.

        A file that no rank can read counts as damaged only where the storage gives the others of the
        checkpoint. Raises StorageError where it gives none.
        """

        def inspect() -> dict[str, Any]:
            rank, size, _ = self._ranks
            names = [name for name, owner in unread if (owner + 1) % size == rank]
            return inspect_files(path, read_manifest(path), names)._asdict()

        reports = self._ranks.together(f"{path} not verified", inspect)
        still = {name: said for report in reports for name, said in report["unread"].items()}
        if len(still) == files:
            name, said = next(iter(still.items()))
            raise StorageError(
                f"{path}: none of its {files} files can be read, in several tries on several ranks "
                f"({name}: {said}); nothing was set aside"
            )
        problems = [problem for report in reports for problem in report["problems"]]
        lines = (f"{path / name}: cannot be read: {said}, others can" for name, said in still.items())
        return [*problems, *lines]

    def _reject(self, path: Path, problems: list[str], read_only: bool) -> str:
        """Set a bad checkpoint aside; returns the line that says so. Collective."""

        def rename() -> str:
            target = path.with_name(path.name + ".corrupt")
            count = 1
            while os.path.lexists(target):
                count += 1
                target = path.with_name(f"{path.name}.corrupt.{count}")
            path.rename(target)
            sync_directory(self.directory)
            return target.name

        reason = _shortened(problems, 3)
        if read_only:
            line = f"{path.name} skipped: {reason}"
        else:
            name = self._ranks.on_first(f"{path} not set aside", rename)
            line = f"{path.name} set aside as {name}: {reason}"
        if self._ranks.rank == 0:
            print(f"checkpoint {line}", flush=True)
        return line

    def _compare(
        self, path: Path, state: Mapping[str, Any], partial: tuple[str, ...], optional: tuple[str, ...]
    ) -> _Compared:
        """What is in `path`, whose keys are those of the state. Collective. Raises CheckpointError."""
        flat: dict[str, Any] = {}
        paths: dict[str, KeyPath] = {}
        found: list[tuple[dict[str, Any], Metadata]] = []

        def compare() -> dict[str, Any]:
            leaves, leaf_paths = flatten(state)
            flat.update(leaves)
            paths.update(leaf_paths)
            manifest = read_manifest(path)
            metadata = read_metadata(path, manifest["files"])
            found.append((manifest, metadata))
            stored = metadata.state_dict_metadata
            return {
                "wanted": sorted(flat),
                "missing": [key for key in flat if key not in stored and not _is_under(key, optional)],
                "misshaped": _misshaped(flat, stored),
            }

        reports = self._ranks.together(f"{path} not loaded", compare)
        manifest, metadata = found[0]
        wanted = {key for report in reports for key in report["wanted"]}
        stored = metadata.state_dict_metadata
        unexpected = {
            key
            for key in stored
            if key not in wanted and not _is_under(key, optional) and (not partial or _is_under(key, partial))
        }
        differences = {
            "missing": {key for report in reports for key in report["missing"]},
            "unexpected": unexpected,
            "misshaped": {key for report in reports for key in report["misshaped"]},
        }
        _refuse_differences(path, differences)
        return _Compared(manifest, metadata, flat, paths)

    def _read(
        self,
        path: Path,
        set_aside: list[str],
        state: Mapping[str, Any],
        partial: tuple[str, ...],
        optional: tuple[str, ...],
    ) -> Loaded:
        manifest, metadata, flat, paths = self._compare(path, state, partial, optional)
        held = {key: value for key, value in flat.items() if key in metadata.state_dict_metadata}

        def read() -> None:
            read_state(held, path, metadata, self._ranks)

        self._ranks.together(f"{path} not loaded", read)
        unflatten_into(state, held, paths)
        return Loaded(manifest["step"], manifest["extra"], path, set_aside, sorted(set(flat) - set(held)))

    def _retain(self, saved: int) -> None:
        """Delete all but the newest `keep` checkpoints that read back as they were written. Collective."""
        steps = self._ranks.on_first("checkpoints not listed", self.candidates)
        if len(steps) <= self.keep:
            return
        kept = 0
        for step in steps:
            path = self.directory / step_name(step)
            if kept == self.keep:
                self._ranks.on_first("old checkpoint not deleted", lambda path=path: self._delete(path))
                self._verified.discard(step)
                continue
            problems = [] if step in self._verified else self._problems(path)
            if not problems:
                self._verified.add(step)
                kept += 1
                continue
            line = self._reject(path, problems, read_only=False)
            if step == saved:
                raise StorageError(f"{path}: does not read back as it was written; check the storage: {line}")

    def _delete(self, path: Path) -> None:
        # Renamed first: a deletion that a kill cuts in half leaves no directory that looks committed.
        doomed = path.with_name(path.name + ".deleting")
        try:
            path.rename(doomed)
            if kept := remove(doomed):
                print(f"checkpoint {path.name} deleted; {kept}", flush=True)
        except OSError as error:
            # The new checkpoint is safe: a full trash bin is no reason to stop a run.
            print(f"checkpoint {path.name} not deleted, tried again after the next save: {error}", flush=True)


def _is_under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _misshaped(flat: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in flat.items():
        if key in stored and (asked := _form_of(value)) != (found := _form_of(stored[key])):
            lines.append(f"{key} (found {found}, expected {asked})")
    return lines


def _form_of(value: Any) -> str:
    if isinstance(value, TensorStorageMetadata):
        return f"{value.properties.dtype} {list(value.size)}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return "plain value"


def _refuse_differences(path: Path, differences: Mapping[str, set[str]]) -> None:
    parts = [
        f"{len(keys)} {name}: {_shortened(sorted(keys), _SHOWN_KEYS, ', ')}"
        for name, keys in differences.items()
        if keys
    ]
    if parts:
        raise CheckpointError(
            f"{path}: its state is not that of this run; {'; '.join(parts)}; "
            "resume with the model and optimizer settings it was saved with"
        )


def _shortened(items: list[str], limit: int, separator: str = "; ") -> str:
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
