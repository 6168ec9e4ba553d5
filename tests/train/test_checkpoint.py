"""One process: what is saved comes back bit for bit, and nothing damaged is ever loaded."""

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import CheckpointError, StorageError
from train.checkpoint import store as store_module
from train.checkpoint.atomic import write_atomically
from train.checkpoint.manifest import MANIFEST, digest_file, encode_manifest, read_manifest, verify
from train.checkpoint.storage import DigestingFileSystem, DigestingStream, flatten, unflatten_into
from train.checkpoint.store import CheckpointStore


def make_state(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(7, 5, generator=generator)
    weights[0, 0] = float("nan")
    weights[1, 1] = float("-inf")
    return {
        "model": {"w": weights, "half": torch.randn(9, generator=generator).bfloat16()},
        "optim": {
            "state": {"w": {"exp_avg": torch.randn(7, 5, generator=generator), "step": torch.tensor(9.0)}},
            "param_groups": [{"lr": seed * 0.1, "betas": (0.9, 0.95), "params": ["w"]}],
        },
        "rng": {"rank0": torch.randint(0, 256, (64,), generator=generator, dtype=torch.uint8)},
        "seen": seed,
    }  # fmt: skip


def as_bytes(state: dict[str, Any]) -> dict[str, Any]:
    flat, _ = flatten(state)
    return {
        key: value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.item()
        for key, value in flat.items()
        if isinstance(value, torch.Tensor)
    } | {key: value for key, value in flat.items() if not isinstance(value, torch.Tensor)}


def open_store(tmp_path: Path, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=keep)


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    extra = {"cursor": {"epoch": 1, "offset": 2**60}, "lr": 0.1 + 0.2, "tracking": "abc"}
    path = store.save(12, make_state(1), extra)
    target = make_state(2)
    weights = target["model"]["w"]
    loaded = store.load_latest(target)
    assert loaded is not None
    assert (loaded.step, loaded.path, loaded.set_aside, loaded.skipped) == (12, path, [], [])
    assert loaded.extra == extra
    assert as_bytes(target) == as_bytes(make_state(1))
    assert target["model"]["w"] is weights, "tensors are loaded in place"
    assert path.name == "step_00000012"
    assert verify(path) == []


def test_the_manifest_lists_every_file_with_size_and_digest(tmp_path: Path) -> None:
    path = open_store(tmp_path).save(3, make_state(1), {})
    manifest = read_manifest(path)
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {MANIFEST}
    for name, entry in manifest["files"].items():
        assert entry == {"size": (path / name).stat().st_size, "xxh3_128": digest_file(path / name)}
    assert (manifest["step"], manifest["world_size"], manifest["format"]) == (3, 1, 1)


def test_an_empty_directory_has_nothing_to_load(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.candidates() == []
    assert store.load_latest(make_state(1)) is None


def test_every_single_bit_flip_is_detected(tmp_path: Path) -> None:
    path = open_store(tmp_path).save(1, make_state(1), {"note": 'é \\ " text', "list": [1, 2.5, None]})
    files = sorted(path.iterdir())
    generator = random.Random(0)
    for trial in range(240):
        # Each file in turn, so that the small ones are hit as often as the shard.
        file = files[trial % len(files)]
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        problems = verify(path)
        assert problems, f"{file.name}: flip {trial} went unseen"
        assert str(file) in problems[0]
        file.write_bytes(original)
    assert verify(path) == []


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001"
    path.mkdir()
    original = encode_manifest({"step": 1, "files": {}, "extra": {"é": "\n"}})
    (path / MANIFEST).write_bytes(original)
    assert verify(path) == []
    for position in range(len(original) * 8):
        damaged = bytearray(original)
        damaged[position // 8] ^= 1 << position % 8
        (path / MANIFEST).write_bytes(damaged)
        assert verify(path), f"bit {position % 8} of byte {position // 8} went unseen"


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata", MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "append", "directory", "link"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_older_one_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], victim: str, damage: str
) -> None:
    store = open_store(tmp_path)
    store.save(1, make_state(1), {})
    file = store.save(2, make_state(2), {}) / victim
    content = file.read_bytes()
    file.unlink()
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "append":
        file.write_bytes(content + b"\0")
    elif damage == "directory":
        file.mkdir()
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(content[:-1] + b"?")
        file.symlink_to(tmp_path / "elsewhere")
    target = make_state(9)
    loaded = open_store(tmp_path).load_latest(target)
    assert loaded is not None
    assert loaded.step == 1
    assert as_bytes(target) == as_bytes(make_state(1))
    assert names(tmp_path) == ["step_00000001", "step_00000002.corrupt"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    for part in (str(file), "found", "expected", "step_00000002.corrupt"):
        assert part in printed[0]
        assert part in loaded.set_aside[0]


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_foreign_file_is_refused_and_never_executed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(1, make_state(1), {})
    newest = store.save(2, make_state(2), {})
    (newest / "__1_0.distcp").write_bytes(pickle.dumps(Canary(tmp_path / "executed")))
    loaded = store.load_latest(make_state(3))
    assert loaded is not None
    assert loaded.step == 1
    assert "__1_0.distcp: found, expected no such file" in loaded.set_aside[0]
    assert not (tmp_path / "executed").exists()


def test_foreign_metadata_is_never_executed_before_its_digest_is_known(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = store.save(1, make_state(1), {})
    (path / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "executed")))
    with pytest.raises(CheckpointError):
        store.load_latest(make_state(3))
    assert not (tmp_path / "executed").exists()


def forge(path: Path, name: str, content: bytes) -> None:
    """Replace a file and write a manifest that vouches for it, as somebody with write access can."""
    (path / name).write_bytes(content)
    fields = read_manifest(path)
    del fields["sha256"], fields["format"]
    fields["files"][name] = {"size": len(content), "xxh3_128": digest_file(path / name)}
    (path / MANIFEST).write_bytes(encode_manifest(fields))


def test_metadata_with_a_valid_digest_still_executes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = store.save(1, make_state(1), {})
    forge(path, ".metadata", pickle.dumps(Canary(tmp_path / "executed")))
    assert verify(path) == []
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        store.load_latest(make_state(3))
    assert not (tmp_path / "executed").exists()


def test_a_plain_value_with_a_valid_digest_still_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "flatten", lambda state: (dict(state), {}))
        store.save(1, {"seen": Canary(tmp_path / "executed")}, {})
    with pytest.raises(RuntimeError, match=r"Unsupported|weights_only|Unpickl"):
        store.load_latest({"seen": 1})
    assert not (tmp_path / "executed").exists()


def test_metadata_may_not_name_files_outside_the_manifest(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = store.save(1, make_state(1), {})
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for record in metadata.storage_data.values():
        record.relative_path = "../../elsewhere"
    forge(path, ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="elsewhere"):
        store.load_latest(make_state(3))


def test_all_bad_is_an_error_that_lists_each_with_its_reason(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in (1, 2):
        path = store.save(step, make_state(step), {})
        (path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        store.load_latest(make_state(3))
    assert caught.value.exit_code == 66
    for part in ("step_00000001", "step_00000002", "found 1 bytes", "every checkpoint is bad"):
        assert part in str(caught.value)
    # The next start finds only what this one set aside. It must not begin at step 0.
    with pytest.raises(CheckpointError, match="set aside by an earlier start"):
        open_store(tmp_path).load_latest(make_state(3))


def test_after_a_fallback_the_same_step_is_saved_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(1, make_state(1), {})
    for again in range(3):
        newest = store.save(2, make_state(2), {})
        (newest / "__0_0.distcp").write_bytes(b"x")
        loaded = store.load_latest(make_state(3))
        assert loaded is not None
        assert loaded.step == 1, f"{again=}"
    store.save(2, make_state(4), {})
    target = make_state(3)
    loaded = store.load_latest(target)
    assert loaded is not None
    assert loaded.step == 2
    assert as_bytes(target) == as_bytes(make_state(4))
    assert [name for name in names(tmp_path) if "corrupt" in name] == [
        "step_00000002.corrupt",
        "step_00000002.corrupt.2",
        "step_00000002.corrupt.3",
    ]


def test_a_step_that_is_there_is_replaced(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(2, make_state(1), {})
    store.save(2, make_state(5), {})
    target = make_state(3)
    assert store.load_latest(target) is not None
    assert as_bytes(target) == as_bytes(make_state(5))
    assert names(tmp_path) == ["step_00000002"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = store.save(2, make_state(1), {})
    path.rename(path.with_name(path.name + ".replaced"))
    target = make_state(3)
    assert store.load_latest(target) is not None
    assert as_bytes(target) == as_bytes(make_state(1))
    assert names(tmp_path) == ["step_00000002"]


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(step, make_state(step), {})
    assert store.candidates() == [5, 4]
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


def test_retention_counts_only_checkpoints_that_read_back(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep=2)
    store.save(1, make_state(1), {})
    middle = store.save(2, make_state(2), {})
    (middle / "__0_0.distcp").write_bytes(b"x")
    store.save(3, make_state(3), {})
    assert store.candidates() == [3, 1]
    assert names(tmp_path) == ["step_00000001", "step_00000002.corrupt", "step_00000003"]


def test_leftovers_are_swept_and_never_loaded(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = store.save(1, make_state(1), {})
    for suffix in ("tmp", "deleting"):
        shutil.copytree(path, path.with_name(f"step_00000009.{suffix}"))
    (tmp_path / "checkpoints" / "notes").mkdir()
    loaded = store.load_latest(make_state(3))
    assert loaded is not None
    assert loaded.step == 1
    assert names(tmp_path) == ["notes", "step_00000001"]


def test_read_only_changes_nothing_on_disk(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(1, make_state(1), {})
    (store.save(2, make_state(2), {}) / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "checkpoints" / "step_00000003.tmp").mkdir()
    before = names(tmp_path)
    loaded = store.load_latest(make_state(3), read_only=True)
    assert loaded is not None
    assert loaded.step == 1
    assert len(loaded.set_aside) == 1
    assert names(tmp_path) == before


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    path = open_store(tmp_path).save(1, make_state(1), {})
    moved = path.with_name("step_00000007")
    path.rename(moved)
    assert "manifest of step 1" in verify(moved)[0]


def test_a_linked_directory_is_no_candidate(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = store.save(1, make_state(1), {})
    outside = tmp_path / "step_00000009"
    path.rename(outside)
    path.symlink_to(outside)
    assert store.candidates() == []


def test_another_format_is_refused_and_left_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.manifest.FORMAT", 2)
        store.save(1, make_state(1), {})
    with pytest.raises(CheckpointError, match="format 2, this version reads format 1"):
        store.load_latest(make_state(3))
    assert names(tmp_path) == ["step_00000001"]


def test_lost_permission_condemns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.save(1, make_state(1), {})

    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("train.checkpoint.manifest.digest_file", denied)
    with pytest.raises(CheckpointError, match="Permission denied; nothing was set aside"):
        store.load_latest(make_state(3))
    assert names(tmp_path) == ["step_00000001"]


def test_keys_that_differ_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    stored = make_state(1)
    stored["model"]["extra"] = {f"e{index:02}": torch.zeros(1) for index in range(12)}
    store.save(1, stored, {})
    target = make_state(2)
    target["model"]["new"] = torch.zeros(3)
    target["model"]["w"] = torch.zeros(7, 6)
    target["model"]["half"] = torch.zeros(9)
    target["seen"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        store.load_latest(target)
    message = str(caught.value)
    assert "1 missing: model.new" in message
    assert "12 unexpected: model.extra.e00, " in message
    assert "model.extra.e09, and 2 more" in message
    assert "model.w (found torch.float32 [7, 5], expected torch.float32 [7, 6])" in message
    assert "model.half (found torch.bfloat16 [9], expected torch.float32 [9])" in message
    assert "seen (found plain value, expected torch.float32 [1])" in message
    assert torch.equal(target["model"]["w"], torch.zeros(7, 6))
    assert names(tmp_path) == ["step_00000001"], "a mismatch is not damage"


def test_partial_loads_one_part_in_full(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(1, make_state(1), {})
    target = {"model": make_state(2)["model"]}
    with pytest.raises(CheckpointError, match=r"unexpected: optim"):
        store.load_latest(target)
    assert store.load_latest(target, partial=("model",)) is not None
    assert as_bytes(target) == as_bytes({"model": make_state(1)["model"]})
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.half"):
        store.load_latest({"model": {"w": torch.zeros(7, 5)}}, partial=("model",))
    with pytest.raises(CheckpointError, match=r"1 missing: model\.other"):
        store.load_latest({"model": target["model"] | {"other": torch.zeros(1)}}, partial=("model",))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.half, model\.w"):
        store.load_latest({"modelx": torch.zeros(1)}, partial=("model",))


def test_optional_keys_are_loaded_when_stored_and_reported_when_not(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(1, make_state(1), {})
    target = make_state(2)
    target["rng"] = {"rank1": torch.full((64,), 7, dtype=torch.uint8)}
    loaded = store.load_latest(target, optional=("rng",))
    assert loaded is not None
    assert loaded.skipped == ["rng.rank1"]
    assert target["rng"]["rank1"].eq(7).all()
    same = make_state(2)
    loaded = store.load_latest(same, optional=("rng",))
    assert loaded is not None
    assert loaded.skipped == []
    assert as_bytes(same) == as_bytes(make_state(1))


@pytest.mark.parametrize("extra", [{"loss": float("nan")}, {"path": Path("x")}])
def test_extra_that_is_not_strict_json_is_refused_before_anything_is_written(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match="step_00000001: checkpoint not saved"):
        open_store(tmp_path).save(1, make_state(1), extra)
    assert not (tmp_path / "checkpoints").exists()


def test_a_state_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(RuntimeError, match="object is neither tensor nor plain"):
        store.save(1, {"model": {"object": object()}}, {})
    with pytest.raises(RuntimeError, match=r"two values are named a\.b"):
        store.save(1, {"a": {"b": 1}, "a.b": 2}, {})
    assert not (tmp_path / "checkpoints").exists()


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


def test_flatten_and_unflatten_are_inverse() -> None:
    state = make_state(1)
    flat, paths = flatten(state)
    assert flat["optim.param_groups.0.betas"] == (0.9, 0.95)
    assert flat["optim.param_groups.0.params"] == ["w"]
    target = make_state(2)
    unflatten_into(target, flat, paths)
    assert as_bytes(target) == as_bytes(state)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    path = open_store(tmp_path).save(1, make_state(1), {"name": "x"})
    assert json.loads((path / MANIFEST).read_text())["extra"] == {"name": "x"}
