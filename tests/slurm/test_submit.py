"""Whatever is typed either reaches sbatch as it is, one argument each, or is refused with exit code 64."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conf.compose import compose_tree
from conf.errors import ConfigError, DataError, StorageError
from conf.revision import revision
from slurm import submit
from slurm.options import quoted, read_options
from slurm.script import Submission, notice_of, sbatch_flags
from train.config.load import load_config
from train.config.versions import VERSION

ROOT = submit.ROOT


def config_of(*overrides: str) -> dict:
    return compose_tree(overrides)


def words_of_bash(line: str) -> list[str]:
    """The words that bash makes of a line, one below the other."""
    done = subprocess.run(
        ["bash", "-c", f'{line}\nprintf "%s\\0" "$@"'], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


@given(
    st.lists(st.from_regex(r"\A[a-z][a-z.]{0,8}=", fullmatch=True), min_size=1, max_size=3),
    st.text(max_size=12),
)
@example(["layout.pattern="], "'3*(gdn kda) attn'")
@example(["a="], "$(reboot); `reboot` & rm -rf / > x \"' \\ é *?")
@example(["a="], "1\nreboot")
def test_an_override_is_one_unchanged_argument_or_refused(keys: list[str], value: str) -> None:
    overrides = [key + value for key in keys]
    try:
        options = read_options(overrides)
    except ConfigError:
        assert not value.isprintable()
        return
    assert options.overrides == overrides
    job = Submission(Path("runs/x"), config_of(), options.overrides)
    (line,) = [line for line in job.text().splitlines() if line.startswith("set -- ")]
    assert shlex.split(line)[2:] == overrides


def test_bash_reads_the_overrides_as_they_were_typed() -> None:
    typed = ["a=$(reboot); `x` & > y", 'b="q\'" \\ * é', "c=${d.e}", "d="]
    job = Submission(Path("runs/x"), config_of(), typed)
    (line,) = [line for line in job.text().splitlines() if line.startswith("set -- ")]
    assert words_of_bash(line) == typed


@given(st.text(min_size=1, max_size=12))
@example('it\'s "so"')
@example("größe, [1] {a: b}")
def test_a_quoted_value_is_read_as_it_was(text: str) -> None:
    if not text.isprintable() or "\\" in text or "$" in text:
        return
    assert compose_tree([quoted("run.dir", text)])["run"]["dir"] == text


def test_flags_are_keys_and_win_over_them() -> None:
    typed = [
        "slurm.time=1:00:00",
        "--time",
        "24:00:00",
        "-N2",
        "--gpus-per-node=4",
        "-p",
        "a,b",
        "--mem=900G",
        "-J",
        "n",
    ]
    options = read_options(typed)
    flags = sbatch_flags(config_of("cluster=h100_8n", *options.lines))
    wanted = ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=24:00:00", "--partition=a,b"]
    assert set(wanted) | {"--mem=900G", "--job-name=n"} <= set(flags)
    assert options.passed == []


def test_keys_of_the_group_are_flags() -> None:
    keys = {
        "qos": ("high", "--qos=high"),
        "reservation": ("night", "--reservation=night"),
        "constraint": ("'h100&ib'", "--constraint=h100&ib"),
        "exclude": ("'n1,n[3-5]'", "--exclude=n1,n[3-5]"),
        "mail_user": ("me@example.org", "--mail-user=me@example.org"),
        "memory": ("500G", "--mem=500G"),
        "notice_seconds": ("600", "--signal=B:USR1@600"),
        "account": ("proj", "--account=proj"),
    }
    flags = sbatch_flags(config_of(*(f"slurm.{name}={value}" for name, (value, _) in keys.items())))
    assert {flag for _, flag in keys.values()} | {"--mail-type=FAIL,REQUEUE,END", "--exclusive"} <= set(flags)
    bare = sbatch_flags(config_of("slurm.exclusive=false", "slurm.memory=null"))
    assert not [
        flag for flag in bare if flag.startswith(("--exclusive", "--mem", "--qos", "--mail", "--time"))
    ]
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(bare)


def test_a_cluster_without_gpus_asks_for_processes() -> None:
    flags = sbatch_flags(config_of("cluster=h100_8n", "cluster.device=cpu"))
    assert {"--nodes=8", "--ntasks-per-node=8"} <= set(flags)
    assert not [flag for flag in flags if "gpus" in flag]


@pytest.mark.parametrize(
    ("directory", "directive"),
    [
        ("runs/x", f"#SBATCH --output={ROOT}/runs/x/logs/%x-%j.out"),
        ("/a/100%j", "#SBATCH --output=/a/100%%j/logs/%x-%j.out"),
        ('/a #b "c" it\'s', '#SBATCH --output="/a #b \\"c\\" it\'s/logs/%x-%j.out"'),
    ],
)
def test_the_log_of_a_job_lies_in_its_run_directory(directory: str, directive: str) -> None:
    # Each form was seen to be read so by sbatch 22.05.
    config = config_of("recipe=smoke") | {"run": {"dir": directory}}
    assert [line for line in Submission(Path(), config, []).directives() if "--output" in line] == [directive]


def test_the_notice_of_an_earlier_start_is_taken(tmp_path: Path) -> None:
    config = config_of(f"run.dir={tmp_path}")
    for text, seconds in ((None, 120), ("90\n", 120), ("431\n", 431), ("9999999\n", 65535), ("torn", 120)):
        if text is not None:
            (tmp_path / "NOTICE").write_text(text)
        assert notice_of(config) == seconds
    assert notice_of(config_of(f"run.dir={tmp_path}", "slurm.notice_seconds=70")) == 70


def test_other_options_go_to_sbatch_as_they_are() -> None:
    typed = [
        "--hold",
        "recipe=smoke",
        "--comment=a b",
        "--dependency",
        "afterok:7",
        "-w",
        "n1",
        "-d=singleton",
        "-qlow",
        "~x",
    ]
    options = read_options(typed)
    assert options.passed == [
        "--hold",
        "--comment=a b",
        "--dependency",
        "afterok:7",
        "-w",
        "n1",
        "-d=singleton",
    ]
    assert options.overrides == ["recipe=smoke", "~x"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--wrap=reboot"], "--wrap"),
        (["--array=1-4"], "--array"),
        (["-a", "1-4"], "-a"),
        (["--ntasks", "3"], "--ntasks"),
        (["--gres=gpu:8"], "--gres"),
        (["--nod", "3"], "--nod"),
        (["--dry"], "--dry"),
        (["--nodes", "three"], "--nodes"),
        (["--nodes=2-4"], "--nodes"),
        (["--time="], "--time"),
        (["--job-name", "a\nb"], "--job-name"),
        (["recipe"], "recipe"),
        (["a=1\nreboot"], repr("a=1\nreboot")),
        (["--comment=a\nb"], repr("--comment=a\nb")),
    ],
)
def test_what_cannot_be_submitted_is_refused(words: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(words)
    assert [violation.key for violation in caught.value.violations] == [key]


class Site:
    """A machine with an sbatch that writes down what it gets."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        script = f'#!/bin/sh\npwd >"{self.log}"\nprintf "%s\\n" "$@" >>"{self.log}"\nexit 3\n'
        (folder / "bin").mkdir()
        (folder / "bin/sbatch").write_text(script)
        (folder / "bin/sbatch").chmod(0o755)

    def submit(self, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """What the command says and returns."""
        environment = os.environ | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SOMEBODY": "me"}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-m", "slurm.submit", *words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def files(self) -> list[str]:
        """Everything below the folder but the stand-in."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        return sorted(str(path) for path in found if path.parts[0] not in ("bin", "log"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


TREE_BEFORE = ("git", "status", "--porcelain", "--ignored", "--untracked-files=all")


@pytest.mark.slow
def test_a_dry_run_says_all_and_writes_nothing(site: Site) -> None:
    def tree() -> list[str]:
        done = subprocess.run(TREE_BEFORE, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if "__pycache__" not in line]

    before, run = tree(), site.folder / "größe me"
    done = site.submit(
        "recipe=smoke", "--dry-run", f"run.dir='{site.folder}/größe ${{oc.env:SOMEBODY}}'", "--hold"
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    command = shlex.split(last)
    assert command[:2] == ["sbatch", "--hold"]
    assert command[2].startswith(f"{run}/slurm/")
    assert f"would write {command[2]}" in done.stdout
    assert "#SBATCH --nodes=1" in done.stdout
    assert site.files() == []
    assert not site.log.exists()
    assert tree() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.widht=3", "parallel.tp=7"], ["model.widht: unknown key; did you mean model.width?"]),
        # Seven nodes: what the cluster alone would allow does not fit the job.
        (
            ["cluster=h100_8n", "--nodes=7", "parallel.tp=16"],
            ["parallel.tp: 16 does not divide the 56 processes"],
        ),
        (["slurm.qoss=x", "optim.lr=a"], ["slurm.qoss: unknown key", "optim.lr: "]),
        (["--time", "90", "--qos=a b"], ["--time: ", "--qos: "]),
        (
            ["model=mixtral_8x7b", "cluster=h100_1n"],
            ["cluster.memory_gib: the fullest rank needs "],
        ),
    ],
    ids=["typo", "ranks", "keys", "flags", "memory"],
)
def test_a_run_that_cannot_start_is_not_submitted(site: Site, words: list[str], said: list[str]) -> None:
    for more in ([], ["--dry-run"]):
        done = site.submit(f"run.dir={site.folder}/run", *words, *more)
        assert done.returncode == 64, done.stdout
        for message in said:
            assert f"error: {message}" in done.stderr
        assert "Traceback" not in done.stderr
        assert "sbatch" not in done.stdout
    assert site.files() == []
    assert not site.log.exists()


@pytest.mark.slow
def test_a_directory_of_another_run_is_refused(site: Site) -> None:
    first = json.loads(
        subprocess.run(
            [sys.executable, "-m", "train.resolve", "recipe=smoke", "--check"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    (site.folder / "run").mkdir()
    (site.folder / "run/config.json").write_text(json.dumps(first))
    same = ["recipe=smoke", f"run.dir={site.folder}/run", "--dry-run"]
    assert site.submit(*same, "slurm.time=1:00:00").returncode == 0
    done = site.submit(*same, "optim.lr=0.5")
    assert done.returncode == 64
    assert "error: optim.lr: the run was started with" in done.stderr


@pytest.mark.slow
def test_the_job_is_written_and_submitted_from_the_repository_root(site: Site) -> None:
    done = site.submit(
        "recipe=smoke", f"run.dir='{site.folder}/a b'", "sample.prompt='a  b'", "--wait", "-p", "long"
    )
    assert done.returncode == 3, done.stderr
    root, *rest = site.log.read_text().splitlines()
    assert root == str(ROOT)
    (folder,) = (site.folder / "a b/slurm").iterdir()
    assert rest == ["--wait", str(folder / "job.sbatch")]
    assert sorted(path.name for path in folder.iterdir()) == ["code", "config.json", "job.sbatch"]
    assert (site.folder / "a b/logs").is_dir()
    copied, found = (revision(root) for root in (folder / "code", ROOT))
    assert copied == found
    assert len(found["commit"]) == 40
    config = json.loads((folder / "config.json").read_text())
    assert (config["run"]["dir"], config["slurm"]["partition"]) == (f"{site.folder}/a b", "long")
    for name in ("train/loop/run.py", "conf/config.yaml", "slurm/settings.py", "pyproject.toml"):
        assert (folder / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list((folder / "code").rglob("__pycache__"))
    script = (folder / "job.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "#SBATCH --partition=long\n" in script


@pytest.mark.slow
def test_the_job_reads_copies_of_the_users_own_files(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is typed below another working directory is found, and may be gone when the job begins."""
    own = site.folder / "own"
    (own / "dir/optim").mkdir(parents=True)
    (own / "dir/optim/slow.yaml").write_text("defaults: [adamw, _self_]\nlr: 0.125\n")
    (own / "dir/notes.txt").write_text("no option")
    (own / "mine.yaml").write_text("defaults:\n  - optim: slow\ntrain: {steps: 7}\n")
    words = ["config=mine.yaml", "--config-dir", "dir", f"run.dir={site.folder}/run", "slurm.snapshot=false"]
    done = site.submit(*words, cwd=own)
    assert done.returncode == 3, done.stderr
    (folder,) = (site.folder / "run/slurm").iterdir()
    copies = sorted(str(path.relative_to(folder)) for path in (folder / "own").rglob("*") if path.is_file())
    assert copies == ["own/0-mine.yaml", "own/1-dir/optim/slow.yaml"]
    shutil.rmtree(own)
    lines = (folder / "job.sbatch").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("set -- ")]
    monkeypatch.chdir(site.folder)
    config = load_config(words_of_bash(line), 1)
    assert (config.optim.lr, config.train.steps, config.run.dir) == (0.125, 7, f"{site.folder}/run")


@pytest.mark.slow
def test_the_config_of_a_run_is_submitted_as_another(site: Site) -> None:
    (site.folder / "first").mkdir()
    saved = {**load_config(["recipe=smoke"], 1).model_dump(mode="json"), "version": VERSION}
    (site.folder / "first/config.json").write_text(json.dumps(saved))
    path = f"config={site.folder}/first/config.json"
    done = site.submit(path, f"run.dir={site.folder}/first", "--dry-run")
    assert done.returncode == 64
    assert "begins another run" in done.stderr
    assert site.submit(path, f"run.dir={site.folder}/second", "--dry-run").returncode == 0


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job = Submission(tmp_path / "file/slurm/1", config_of(), [])
    with pytest.raises(StorageError, match="file/slurm/1"):
        job.write()


def test_a_machine_without_sbatch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = config_of(f"run.dir={tmp_path}/run", "slurm.snapshot=false")
    monkeypatch.setattr(submit, "resolve", lambda lines, options: (0, config))
    with pytest.raises(DataError, match="sbatch: not on the PATH"):
        submit.main([])
