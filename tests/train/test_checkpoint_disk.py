"""Full, lying and failing disks: nothing that was saved is lost."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import StorageError
from tests.train.states import as_bytes, make_state, names, open_store
from train.checkpoint import manifest, transient
from train.checkpoint.atomic import write_atomically
from train.checkpoint.manifest import MANIFEST, verify
from train.checkpoint.storage import DigestingFileSystem, DigestingStream
from train.checkpoint.store import CheckpointStore


class FullDiskStream(DigestingStream):
    """Fails as a full disk does once `room` bytes were written."""

    room = 0

    def write(self, data: Any, /) -> int:
        if self.size_bytes + len(memoryview(data).cast("B")) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


class FullDiskStore(CheckpointStore):
    room = 0

    def _open_file_system(self) -> DigestingFileSystem:
        room = self.room

        class Full(DigestingFileSystem):
            def open_stream(self, path: Path) -> DigestingStream:
                stream = FullDiskStream(path)
                stream.room = room
                return stream

        return Full()


@pytest.mark.parametrize("room", [0, 100, 2000, 6000])
def test_a_full_disk_leaves_the_older_checkpoints_and_no_temporary(tmp_path: Path, room: int) -> None:
    open_store(tmp_path).save(1, make_state(1), {})
    store = FullDiskStore(tmp_path / "checkpoints", keep=2)
    store.room = room
    with pytest.raises(StorageError, match="the disk is full") as caught:
        store.save(2, make_state(2), {})
    assert caught.value.exit_code == 74
    assert "step_00000002.tmp/" in str(caught.value)
    assert names(tmp_path) == ["step_00000001"]
    assert verify(tmp_path / "checkpoints" / "step_00000001") == []


@contextmanager
def tiny_disk(path: Path) -> Iterator[None]:
    path.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=2m tmpfs {path} 2>/dev/null") != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield
    finally:
        os.system(f"umount {path}")


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk"):
        store = CheckpointStore(tmp_path / "disk" / "checkpoints", keep=2)
        first = {"model": torch.arange(200_000, dtype=torch.float32)}
        store.save(1, first, {})
        with pytest.raises(StorageError, match="the disk is full"):
            store.save(2, {"model": torch.zeros(500_000)}, {})
        assert store.candidates() == [1]
        assert len(list(store.directory.iterdir())) == 1
        target = {"model": torch.zeros(200_000)}
        assert store.load_latest(target) is not None
        assert torch.equal(target["model"], first["model"])


def test_a_disk_that_lies_is_found_by_retention_before_it_costs_a_good_checkpoint(tmp_path: Path) -> None:
    class Lying(DigestingStream):
        def write(self, data: Any, /) -> int:
            written = super().write(data)
            self._file.seek(0)
            self._file.write(b"\xff")
            self._file.seek(0, os.SEEK_END)
            return written

    class LyingStore(CheckpointStore):
        def _open_file_system(self) -> DigestingFileSystem:
            fs = DigestingFileSystem()
            fs.open_stream = Lying
            return fs

    good = open_store(tmp_path, keep=2)
    good.save(1, make_state(1), {})
    good.save(2, make_state(2), {})
    with pytest.raises(StorageError, match="does not read back"):
        LyingStore(tmp_path / "checkpoints", keep=2).save(3, make_state(3), {})
    assert good.candidates() == [2, 1]


def test_a_failed_rename_of_a_replacement_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    store.save(1, make_state(1), {})
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "step_00000001.tmp":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(StorageError):
            store.save(1, make_state(2), {})
    assert names(tmp_path) == ["step_00000001"]
    target = make_state(3)
    assert store.load_latest(target) is not None
    assert as_bytes(target) == as_bytes(make_state(1))


def test_everything_is_on_disk_before_the_rename_that_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    open_store(tmp_path).save(1, make_state(1), {})
    commit = events.index("rename step_00000001.tmp")
    before = set(events[:commit])
    assert {"sync __0_0.distcp", "sync .metadata.tmp", f"sync {MANIFEST}"} <= before
    assert events[commit - 1] == "sync step_00000001.tmp"
    assert events[commit + 1 :] == ["sync checkpoints"]


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cursor.json"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"cursor\.json: cannot write: the disk is full"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["cursor.json"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(StorageError, match="missing"):
        write_atomically(tmp_path / "missing" / "x", b"")


class FailingReads:
    """Files of these names fail to open for reading, so many times each, as a failing server makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **times: int) -> None:
        self.left = {name.replace("__", "."): count for name, count in times.items()}
        self.tried = 0
        opened = Path.open

        def failing(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "r" in mode and self.left.get(path.suffix or path.name, 0):
                self.left[path.suffix or path.name] -= 1
                self.tried += 1
                raise OSError(errno.EIO, "Input/output error", str(path))
            return opened(path, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", failing)
        monkeypatch.setattr(transient, "WAITS", (0.0, 0.0, 0.0))


ALWAYS = 10_000


def test_reads_that_fail_for_a_moment_condemn_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(tmp_path).save(1, make_state(1), {})
    reads = FailingReads(monkeypatch, __distcp=3, __json=2, __metadata=1)
    target = make_state(2)
    assert open_store(tmp_path).load_latest(target) is not None
    assert as_bytes(target) == as_bytes(make_state(1))
    assert reads.tried == 6
    # The second one fails in loading, once digests were compared.
    reads = FailingReads(monkeypatch, __distcp=0)
    digests = iter([0])
    compare = manifest.digest_file

    def then_failing(path: Path) -> str:
        found = compare(path)
        if path.suffix == ".distcp" and next(digests, None) is not None:
            reads.left[".distcp"] = 2
        return found

    monkeypatch.setattr(manifest, "digest_file", then_failing)
    target = make_state(3)
    assert open_store(tmp_path).load_latest(target) is not None
    assert as_bytes(target) == as_bytes(make_state(1))
    assert reads.tried == 2


@pytest.mark.parametrize("failing", [{"__distcp": ALWAYS, "__metadata": ALWAYS}, {"__json": ALWAYS}])
def test_storage_that_gives_nothing_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: dict[str, int]
) -> None:
    for step in (1, 2):
        open_store(tmp_path).save(step, make_state(step), {})
    with monkeypatch.context() as patch:
        FailingReads(patch, **failing)
        with pytest.raises(StorageError, match="in several tries") as caught:
            open_store(tmp_path).load_latest(make_state(3))
    assert caught.value.exit_code == 74
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    loaded = open_store(tmp_path).load_latest(make_state(3))
    assert loaded is not None
    assert loaded.step == 2


def test_one_file_that_no_try_reads_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        open_store(tmp_path).save(step, make_state(step), {})
    opened = Path.open

    def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.match("step_00000002/*.distcp"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    monkeypatch.setattr(transient, "WAITS", (0.0, 0.0, 0.0))
    loaded = open_store(tmp_path).load_latest(make_state(3))
    assert loaded is not None
    assert loaded.step == 1
    assert names(tmp_path) == ["step_00000001", "step_00000002.corrupt"]
    assert "Input/output error, others can" in loaded.set_aside[0]


def test_room_for_a_checkpoint_is_asked_for_before_the_first_step(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    room = os.statvfs(tmp_path)
    free = room.f_bavail * room.f_frsize
    store.probe(free // 2)
    assert names(tmp_path) == []
    with pytest.raises(StorageError, match=r"GiB are free, a checkpoint needs [\d,.]+ .* free space"):
        store.probe(2 * free)
