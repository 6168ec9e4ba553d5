"""Whatever looks like a checkpoint is read, or named: no run starts over beside one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import CheckpointError
from tests.permissions import bound_by_permissions
from tests.train.conftest import Corpus
from tests.train.runs import log_path, metrics_of, run_to_end
from tests.train.states import as_bytes, make_state, names, open_store
from train.checkpoint.entries import list_entries
from train.checkpoint.manifest import MANIFEST
from train.checkpoint.records import read_record, write_record


def save_and_move(tmp_path: Path, step: int = 1) -> tuple[Path, Path]:
    """Where a checkpoint was, and where it is now: outside of the run."""
    path = open_store(tmp_path).save(step, make_state(step), {})
    return path, path.rename(tmp_path / f"elsewhere_{step}")


def refusal(tmp_path: Path, read_only: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_store(tmp_path).load_latest(make_state(3), read_only=read_only)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "checkpoints") in str(caught.value)
    return str(caught.value)


def test_links_are_followed(tmp_path: Path) -> None:
    path, outside = save_and_move(tmp_path)
    path.symlink_to(outside)
    target = make_state(3)
    loaded = open_store(tmp_path).load_latest(target)
    assert loaded is not None
    assert as_bytes(target) == as_bytes(make_state(1))
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "moved")
    assert open_store(tmp_path).load_latest(make_state(3)) is not None


def test_retention_deletes_a_link_and_says_what_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, outside = save_and_move(tmp_path)
    path.symlink_to(outside)
    store = open_store(tmp_path, keep=2)
    for step in (2, 3):
        store.save(step, make_state(step), {})
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    assert f"{outside} stays" in capsys.readouterr().out
    assert (outside / MANIFEST).exists()


def test_a_link_is_replaced_by_what_is_saved(tmp_path: Path) -> None:
    path, outside = save_and_move(tmp_path)
    path.symlink_to(outside)
    open_store(tmp_path).save(1, make_state(2), {})
    assert names(tmp_path) == ["step_00000001"]
    assert not path.is_symlink()
    assert (outside / MANIFEST).exists()


def test_a_damaged_link_is_set_aside(tmp_path: Path) -> None:
    open_store(tmp_path).save(1, make_state(1), {})
    path, outside = save_and_move(tmp_path, 2)
    path.symlink_to(outside)
    (outside / "__0_0.distcp").write_bytes(b"x")
    loaded = open_store(tmp_path).load_latest(make_state(3))
    assert loaded is not None
    assert loaded.step == 1
    assert names(tmp_path) == ["step_00000001", "step_00000002.corrupt"]
    assert (outside / MANIFEST).exists()


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to nowhere": (lambda path: path.symlink_to("gone"), "a link to gone, which is not there"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a file": (lambda path: path.write_text("x"), "no directory"),
    "a link to a file": (lambda path: path.symlink_to(__file__), "no directory"),
    "a pipe": (lambda path: os.mkfifo(path), "no directory"),
    "no permission": (lambda path: path.mkdir(mode=0), "Permission denied"),
}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("form", UNREADABLE)
def test_what_cannot_be_opened_is_an_error_and_no_older_one_is_taken(
    tmp_path: Path, form: str, read_only: bool
) -> None:
    make, reason = UNREADABLE[form]
    open_store(tmp_path).save(1, make_state(1), {})
    make(tmp_path / "checkpoints" / "step_00000002")
    with bound_by_permissions():
        said = refusal(tmp_path, read_only)
    assert "step_00000002: " in said
    assert reason in said
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("form", UNREADABLE)
def test_a_checkpoints_directory_that_cannot_be_listed(tmp_path: Path, form: str) -> None:
    make, _ = UNREADABLE[form]
    make(tmp_path / "checkpoints")
    with bound_by_permissions():
        assert "cannot be listed" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["step_1", "step_00000001.bak", "step_00000001 (copy)", "best", ".hidden"])
def test_a_checkpoint_of_another_name_is_no_reason_to_start_over(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = open_store(tmp_path).save(1, make_state(1), {})
    shutil.copytree(path, path.with_name(name))
    assert open_store(tmp_path).load_latest(make_state(3)) is not None
    assert f"passed over {name}: not named as a checkpoint is" in capsys.readouterr().out
    shutil.rmtree(path)
    assert name in refusal(tmp_path)
    assert name in refusal(tmp_path, read_only=True)


def test_what_was_set_aside_is_named_at_every_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_store(tmp_path).save(1, make_state(1), {})
    (open_store(tmp_path).save(2, make_state(2), {}) / "__0_0.distcp").write_bytes(b"x")
    for _ in range(2):
        assert open_store(tmp_path).load_latest(make_state(3)) is not None
        assert "step_00000002.corrupt" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_left_alone_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000003.tmp").mkdir()
    (tmp_path / "checkpoints" / "README").touch()
    assert open_store(tmp_path).load_latest(make_state(3)) is None
    assert capsys.readouterr().out == ""
    assert names(tmp_path) == ["README", "notes"]


parts = st.sampled_from(["step_", "step", "00000012", "12", ".tmp", ".corrupt", ".replaced", "-copy", "x"])


@given(st.lists(parts, min_size=1, max_size=4).map("".join))
def test_no_directory_of_any_name_is_lost(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp("entries")
    (root / name).mkdir()
    (root / name / MANIFEST).touch()
    found = list_entries(root)
    named = [f"step_{step:08d}" for step in found.steps]
    assert [*named, *found.leftovers, *found.set_aside, *found.unnamed] == [name]


@pytest.fixture(scope="module")
def stopped(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps whose last checkpoint is gone: it has that of step 4."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    assert run_to_end(corpus.overrides(directory, "train.steps=6")) == 0
    shutil.rmtree(directory / "checkpoints" / "step_00000006")
    identity = read_record(directory / "run.json")
    assert identity is not None
    write_record(directory / "run.json", identity | {"step": 4})
    return directory


def link_all(run: Path) -> None:
    (run / "checkpoints").rename(run.parent / "big_disk")
    (run / "checkpoints").symlink_to(run.parent / "big_disk")


def link_one(run: Path) -> None:
    path = run / "checkpoints" / "step_00000004"
    path.symlink_to(path.rename(run.parent / "big_disk"))


def unmount(run: Path) -> None:
    link_all(run)
    (run.parent / "big_disk").rename(run.parent / "unmounted")


def unmount_one(run: Path) -> None:
    link_one(run)
    (run.parent / "big_disk").rename(run.parent / "unmounted")


def rename(run: Path) -> None:
    path = run / "checkpoints" / "step_00000004"
    path.rename(path.with_name("step_4"))


@pytest.mark.parametrize("change", [link_all, link_one])
def test_a_run_goes_on_through_links(
    corpus: Corpus, stopped: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    change(run)
    overrides = corpus.overrides(run, "train.steps=6")
    assert run_to_end(overrides) == 0
    assert "resume step 4/" in log_path(overrides).read_text()
    assert metrics_of(run) == metrics_of(stopped)


@pytest.mark.parametrize("change", [unmount, unmount_one, rename])
def test_a_run_never_starts_over_beside_checkpoints(
    corpus: Corpus, stopped: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    change(run)
    overrides = corpus.overrides(run, "train.steps=6")
    assert run_to_end(overrides) == 66
    (line,) = [x for x in log_path(overrides).read_text().splitlines() if x.startswith("error: ")]
    assert f"{run}/checkpoints: " in line
    assert metrics_of(run) == metrics_of(stopped)
