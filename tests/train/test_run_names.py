"""What a run is called beside others, and which code it says it was made of."""

import json
import subprocess
from pathlib import Path

import pytest

from conf.revision import REVISION_FILE, revision
from train.checkpoint.records import write_record
from train.config.load import compose_run, load_config, read_run
from train.config.versions import VERSION, VERSION_KEY
from train.loop.sweep import checked_jobs


@pytest.mark.parametrize(
    ("typed", "name", "group"),
    [
        ([], "default", "qwen3_next_small"),
        (["run.name=a"], "a", "qwen3_next_small"),
        (["run.dir=/x/big/", "model=mixtral_small", "layout.pattern=2*gdn"], "big", "mixtral_small 2*gdn"),
        (["run.dir=.", "recipe=smoke", "layout=kda_3to1"], Path.cwd().name, "smoke"),
        (["track.name=n", "track.group=g", "recipe=smoke"], "n", "g"),
        (["run.dir=" + 200 * "x", "layout=kda_3to1"], 128 * "x", "qwen3_next_small kda_3to1"),
    ],
)  # fmt: skip
def test_a_run_is_called_by_its_directory_and_its_group_by_what_was_typed(
    typed: list[str], name: str, group: str
) -> None:
    track = compose_run(read_run(typed))["track"]
    assert (track["name"], track["group"]) == (name, group)


def test_a_sweep_is_a_group(tmp_path: Path) -> None:
    typed = ["recipe=smoke", f"run.dir={tmp_path}/lr", "optim.lr=1e-3,3e-3"]
    tracks = [job.config.track for job in checked_jobs(typed)]
    assert [(track.name, track.group) for track in tracks] == [
        ("0 optim.lr=0.001", "lr"),
        ("1 optim.lr=0.003", "lr"),
    ]
    assert {job.config.track.group for job in checked_jobs([*typed, "track.group=g"])} == {"g"}


@pytest.mark.parametrize("group", ["mine", None])
def test_what_goes_on_by_its_directory_alone_keeps_its_group(tmp_path: Path, group: str | None) -> None:
    saved = load_config(["recipe=smoke", f"run.dir={tmp_path}"], 1).model_dump(mode="json")
    # Runs from before there were groups have none, and their recipe is not known any more.
    saved["track"] |= {"name": None, "group": group}
    write_record(tmp_path / "config.json", {VERSION_KEY: VERSION, **saved})
    track = compose_run(read_run([f"run.dir={tmp_path}"]))["track"]
    assert (track["name"], track["group"]) == (tmp_path.name, group)


def test_a_run_of_a_file_is_called_by_what_stands_in_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n- layout: kda_3to1\nmodel:\n  width: 128\n")
    of_file = load_config([f"config={file}", f"run.dir={tmp_path}/first"], 1)
    assert (of_file.track.name, of_file.track.group) == ("first", "qwen3_next_small kda_3to1")
    # The config of a run begins another one, which has a name of its own in the same group.
    (tmp_path / "config.json").write_text(of_file.model_dump_json())
    again = load_config([f"config={tmp_path}/config.json", f"run.dir={tmp_path}/second"], 1)
    assert (again.track.name, again.track.group) == ("second", of_file.track.group)


def git(root: Path, *words: str) -> str:
    author = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(root), *author, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_tree_and_changes_of_packages_are_told(tmp_path: Path) -> None:
    unknown = {"commit": None, "uncommitted": None}
    assert revision(tmp_path) == unknown
    git(tmp_path, "init", "--quiet")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.py").touch()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "runs").mkdir()
    assert revision(tmp_path) == {"commit": commit, "uncommitted": False}
    (tmp_path / "train/new.py").touch()
    assert revision(tmp_path) == {"commit": commit, "uncommitted": True}
    # A copy of the code within the repository is not what the repository is at.
    assert revision(tmp_path / "runs") == unknown
    (tmp_path / "runs" / REVISION_FILE).write_text(json.dumps({"commit": "abc", "uncommitted": False}))
    assert revision(tmp_path / "runs") == {"commit": "abc", "uncommitted": False}
