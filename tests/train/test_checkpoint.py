"""One process: what is saved comes back bit for bit, and nothing damaged is ever loaded."""

import errno
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import CheckpointError
from tests.train.states import as_bytes, make_state, names, open_store
from train.checkpoint import store as store_module
from train.checkpoint.manifest import MANIFEST, digest_file, encode_manifest, read_manifest, verify
from train.checkpoint.storage import flatten, unflatten_into


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
    for part in ("step_00000001", "step_00000002", "found 1 bytes", "no checkpoint is usable"):
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
