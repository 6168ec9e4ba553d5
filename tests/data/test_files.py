"""Every file of a corpus folder is read, or counted and named."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import DataError
from data.config import CorpusConfig
from data.files import Files, find_files
from tests.permissions import bound_by_permissions


def find(source: Path | str, *suffixes: str) -> Files:
    corpus = CorpusConfig.model_validate({"kind": "text", "source": str(source), "suffixes": suffixes})
    return find_files("mine", corpus)


def names(files: Files, root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in files.paths]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, a link to a file and a link to a folder with one, both outside of it."""
    for name in ("in/a.txt", "out/b.txt", "out/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in" / "b.txt").symlink_to("../out/b.txt")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out" / "deep")
    return tmp_path / "in"


def test_links_to_files_and_folders_are_followed(folder: Path) -> None:
    files = find(folder)
    assert names(files, folder) == ["a.txt", "b.txt", "linked/c.txt"]
    assert [path.read_text() for path in files.paths] == ["in/a.txt", "out/b.txt", "out/deep/c.txt"]
    assert files.passed_over == []
    assert names(find(f"{folder}/**/*.txt"), folder) == ["a.txt", "b.txt", "linked/c.txt"]
    (folder.parent / "itself").symlink_to(folder)
    assert len(find(folder.parent / "itself").paths) == 3


@pytest.mark.parametrize("target", [".", "zoo", ".."])
def test_no_folder_is_entered_twice(folder: Path, target: str) -> None:
    (folder / "zoo").mkdir()
    (folder / "zoo" / "d.txt").touch()
    alone = names(find(folder), folder)
    (folder / "loop").symlink_to(target)
    found = find(folder)
    # What is behind the link comes once, and files in real folders keep their names.
    inside = [name for name in names(found, folder) if not name.startswith("loop/")]
    assert set(alone) - {"linked/c.txt"} <= set(inside)
    assert len({path.resolve() for path in found.paths}) == len(alone)
    assert any("folders read already under another name" in line for line in found.passed_over)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to nowhere": (lambda path: path.symlink_to("gone"), "a link to gone, which is not there"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a folder without permission": (lambda path: path.mkdir(mode=0), "Permission denied"),
}


@pytest.mark.parametrize("form", BROKEN)
def test_what_cannot_be_opened_is_an_error(folder: Path, form: str) -> None:
    make, reason = BROKEN[form]
    make(folder / "broken.txt")
    with bound_by_permissions(), pytest.raises(DataError, match=f"{folder}/broken.txt: .*{reason}"):
        find(folder, ".txt")
    if "permission" not in form:
        with pytest.raises(DataError, match=reason):
            find(f"{folder}/*.txt")


def test_what_is_not_read_is_counted_and_named(folder: Path) -> None:
    for name in ("n1.md", "n2.md", "n3.md", "n4.md", ".hidden.txt"):
        (folder / name).touch()
    for name in (".git", "__pycache__", "node_modules"):
        (folder / name).mkdir()
        (folder / name / "x.txt").touch()
    os.mkfifo(folder / "pipe.txt")
    files = find(folder, ".txt")
    assert names(files, folder) == ["a.txt", "b.txt", "linked/c.txt"]
    assert files.passed_over == [
        "2 folders of caches or packages: __pycache__, node_modules",
        "2 hidden: .git, .hidden.txt",
        "4 not ending in .txt: n1.md, n2.md, n3.md and 1 more",
        "1 that are no files: pipe.txt",
    ]
    with pytest.raises(
        DataError, match=r"no file ending in \.jsonl beside .* and 5 more; .*correct the source"
    ):
        find(folder, ".jsonl")


def test_folders_that_a_glob_does_not_enter_are_named(folder: Path) -> None:
    files = find(f"{folder}/*")
    assert names(files, folder) == ["a.txt", "b.txt"]
    assert files.passed_over == [f"1 folders that the glob does not enter: {folder}/linked"]
    assert find(f"{folder}/**").passed_over == []


parts = st.sampled_from(["a", "b", ".c", "__pycache__", "d.txt"])


@given(st.sets(st.lists(parts, min_size=1, max_size=3).map("/".join), min_size=1, max_size=8))
def test_every_entry_is_read_or_in_one_count(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str]
) -> None:
    root = tmp_path_factory.mktemp("files")
    (root / "always.txt").touch()
    for path in sorted(paths):
        file = root / path
        if not file.exists() and all(not folder.is_file() for folder in file.parents):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    files = find(root, ".txt")

    def is_left_alone(path: Path) -> bool:
        return path.name.startswith(".") or (path.name == "__pycache__" and path.is_dir())

    # What is in a folder that is left alone counts with it.
    reached = [x for x in root.rglob("*") if not any(map(is_left_alone, [*x.parents][: -len(root.parts)]))]
    counted = [x for x in reached if x.is_file() or is_left_alone(x)]
    counts = [int(re.match(r"\d+", line)[0]) for line in files.passed_over]  # pyright: ignore
    assert len(files.paths) + sum(counts) == len(counted)
