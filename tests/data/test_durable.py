"""A file of a dataset is there whole or not at all, also where the machine stops in between."""

import errno
import os
from pathlib import Path

import pytest

from data.durable import write_whole


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What is synced and renamed, in order: the name, and the size at that moment."""
    found: list[tuple[str, str, int]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append(("sync", path.name, -1 if path.is_dir() else path.stat().st_size))

    def renamed(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        found.append(("rename", Path(target).name, Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return found


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = calls(monkeypatch)
    write_whole(tmp_path / "card.json", b"seven b")
    (kind, _, size), rename, directory = found
    assert (kind, size) == ("sync", 7)
    assert rename == ("rename", "card.json", 7)
    assert directory == ("sync", tmp_path.name, -1)
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_a_full_disk_leaves_the_old_file_alone_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "card.json"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(path, b"new")
    assert caught.value.filename == str(path)
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [("card.json", b"old")]
