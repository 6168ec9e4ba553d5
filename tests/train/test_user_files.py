"""Configs of a user's own outside of conf/: a file, directories of options, and the config of a run."""

import json
import shutil
from pathlib import Path

import pytest

from conf.compose import compose
from conf.errors import CheckpointError, ConfigError, Violation
from conf.groups import CONF_DIR, group_options
from conf.help import answer
from conf.kinds import kind_of
from conf.user_files import with_search_path
from data.prepare import PrepareConfig
from train.__main__ import PAGE
from train.checkpoint.records import write_record
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.config.versions import VERSION, VERSION_KEY
from train.loop.sweep import checked_jobs

MINE = """
defaults:
  - model: mixtral_small
  - optim: lion
model:
  width: 64
optim:
  lr: 3e-4
  lr_scales: {"*.router": 0.5}
run:
  dir: runs/${model.width}
"""
TINY = """# @package _global_
# A tiny Mixtral.
defaults:
  - mixtral_small
  - _self_
model:
  width: 64
"""
SAVED = Path(__file__).parent / "saved_configs"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file and a directory of options."""
    monkeypatch.chdir(tmp_path)
    write("mine.yaml", MINE)
    write("own/model/tiny.yaml", TINY)
    write("own/optim/slow.yaml", "# Slow.\ndefaults: [adamw, _self_]\nlr: 1e-5   # peak\n")
    write(
        "own/recipe/quick.yaml",
        "# @package _global_\ndefaults:\n  - override /model: tiny\ntrain: {steps: 3}\n",
    )
    return tmp_path


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def load(*overrides: str, world_size: int | None = 1) -> RunConfig:
    return load_config(overrides, world_size)


def refused(*overrides: str, world_size: int | None = 1) -> list[Violation]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, world_size)
    return list(caught.value.violations)


def without_run_dir(config: RunConfig) -> dict:
    found = config.model_dump(mode="json")
    # A run is called by its directory.
    del found["run"], found["track"]["name"]
    return found


def test_a_file_is_what_it_would_be_to_type_it(here: Path) -> None:
    typed = load(
        *("model=mixtral_small", "optim=lion", "model.width=64", "optim.lr=3e-4"),
        *("optim.lr_scales={*.router: 0.5}", "run.dir=runs/64"),
    )
    assert load("config=mine.yaml") == typed


@pytest.mark.parametrize("is_first", [True, False])
def test_what_is_typed_wins_wherever_it_stands(here: Path, is_first: bool) -> None:
    typed = ["optim.lr=0.5", "optim=adamw", "train.steps=9"]
    found = load(*typed, "config=mine.yaml") if is_first else load("config=mine.yaml", *typed)
    assert (found.optim.lr, found.train.steps, found.model.width) == (0.5, 9, 64)
    assert kind_of(found.optim) == "adamw"


def test_a_whole_value_of_a_file_stands_beside_typed_parts_of_what_refers_to_it(here: Path) -> None:
    scaling = "{kind: yarn, factor: 3.0, original_context: 64}"
    write(
        "mine.yaml",
        f"mixer:\n  nope: {{rotary_scaling: {{factor: 5.0}}}}\n  attn: {{rotary_scaling: {scaling}}}\n",
    )
    mixers = load("config=mine.yaml").mixer
    factors = [mixers[name].rotary_scaling.factor for name in ("attn", "nope")]  # pyright: ignore[reportAttributeAccessIssue]
    assert factors == [3.0, 5.0]
    assert mixers["nope"].rotary_scaling.kind == "yarn"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_file_may_name_options_of_a_directory(here: Path) -> None:
    write("mine.yaml", "defaults:\n  - recipe: quick\n  - override /optim: slow\n  - _self_\n")
    found = load("config=mine.yaml", "hydra.searchpath=[file://own]")
    assert (found.model.width, found.optim.lr, found.train.steps) == (64, 1e-5, 3)


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("optim:\n  lrr: 1\n", "optim.lrr", "unknown key; did you mean optim.lr? (in mine.yaml)"),
        ("trian: {steps: 1}\n", "trian", "did you mean train? (in mine.yaml)"),
        ("defaults:\n  - optim: lionn\n", "optim", "did you mean lion? (in mine.yaml)"),
        ("train: {steps: x}\n", "train.steps", "found 'x' (in mine.yaml)"),
        ("mixer: {gdn: {key_dimm: 1}}\n", "mixer.gdn.key_dimm", "mixer.gdn.key_dim? (in mine.yaml)"),
        ("a: [1\nb: 2\n", "config", "mine.yaml, line 2, column 2: no YAML: "),
        ("a: 1\na: 2\n", "config", "mine.yaml, line 2, column 1: no YAML: "),
        ("a: ${\n", "config", "mine.yaml: a: "),
        ("- 1\n", "config", "mine.yaml: holds no keys"),
        ("word\n", "config", "mine.yaml: holds no keys"),
        ("defaults: lion\n", "config", "mine.yaml: defaults is a list of `- GROUP: OPTION`"),
        ("defaults: [smoke]\n", "config", "entry 1 is no `GROUP: OPTION`; found 'smoke'"),
        ("defaults:\n  - optin: lion\n", "config", "did you mean optim?"),
        ("defaults: [_self_, {optim: lion}]\n", "config", "put _self_ last, or leave it out"),
        ("train.steps: 3\n", "train.steps", "YAML reads it as one name"),
        ("model: {mtp.depth: 3}\n", "model.mtp.depth", "YAML reads it as one name"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(here: Path, text: str, key: str, says: str) -> None:
    write("mine.yaml", text)
    (found,) = refused("config=mine.yaml")
    assert found.key == key
    assert says in found.message


def test_what_was_typed_is_not_said_to_stand_in_the_file(here: Path) -> None:
    (found,) = refused("config=mine.yaml", "model.width=x")
    assert "mine.yaml" not in found.message


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("config=mime.yaml", "mime.yaml: no such file; did you mean mine.yaml?"),
        ("config=own", "own: give a .yaml, or the config.json of a run"),
        ("config=[a,b]", "give the path of one file"),
        ("config=latin.yaml", "latin.yaml: no text in UTF-8 (byte 3)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(here: Path, typed: str, says: str) -> None:
    Path("latin.yaml").write_bytes(b"a: \xff\n")
    (found,) = refused(typed)
    assert says in found.message


def test_two_files_are_refused_and_a_sweep_tries_them(here: Path) -> None:
    write("other.yaml", "optim: {lr: 0.25}\n")
    assert "give one" in refused("config=mine.yaml", "config=other.yaml")[0].message
    rates = [job.config.optim.lr for job in checked_jobs(["config=mine.yaml,other.yaml"])]
    assert rates == [3e-4, 0.25]


def test_options_of_a_directory_are_options(here: Path) -> None:
    line = with_search_path(["--config-dir", "own"])
    found = load(*line, "recipe=quick", "optim=slow", "optim.beta1=0.8")
    assert (found.model.width, found.optim.lr, found.train.steps) == (64, 1e-5, 3)
    assert found.optim.beta1 == 0.8  # pyright: ignore[reportAttributeAccessIssue]
    (unknown,) = refused(*line, "optim=slwo")
    assert unknown.message == "'slwo' is not one of adamw, lion, slow; did you mean slow?"
    jobs = checked_jobs([*line, "optim=glob(s*)", "train.steps=1,2"])
    assert [(job.config.optim.lr, job.config.train.steps) for job in jobs] == [(1e-5, 1), (1e-5, 2)]
    page = answer("--help=optim", PAGE, [here / "own"])
    assert "optim=slow: Slow." in page
    assert "optim.lr=1e-5" in page
    assert " slow" in answer("--help", PAGE, [here / "own"])


def test_an_option_that_changes_is_read_again(here: Path) -> None:
    line = ["hydra.searchpath=[file://own]", "optim=slow"]
    assert load(*line).optim.lr == 1e-5
    write("own/optim/slow.yaml", "defaults: [adamw, _self_]\nlr: 0.125\n")
    assert load(*line).optim.lr == 0.125


def test_several_directories_with_odd_names_are_read(here: Path) -> None:
    shutil.move("own/optim", "a, [b]'ö/optim") if Path("a, [b]'ö").mkdir() is None else None
    line = with_search_path(["--config-dir=own", "--config-dir", "a, [b]'ö", "model=tiny", "optim=slow"])
    found = load(*line)
    assert (found.model.width, found.optim.lr) == (64, 1e-5)


@pytest.mark.parametrize(
    ("path", "text", "typed", "says"),
    [
        ("own/optim/bad.yaml", "lr: [1\nb: 2\n", "optim=bad", "bad.yaml, line 2, column 2: no YAML"),
        ("own/optim/bad.yaml", "- 1\n", "optim=bad", "own/optim/bad.yaml)"),
        ("own/optim/bad.yaml", "defaults: [adamw]\nlrr: 1\n", "optim=bad", "optim.lr? (in "),
        (
            "own/model/bad.yaml",
            "model:\n  width: 3\n",
            "model=bad",
            "begins with the line `# @package _global_`",
        ),
        ("own/optim/bad.yaml", "lr: ${\n", "optim=bad", "bad.yaml: lr: "),
        ("own/optim/bad.yaml", "defaults: [adamww]\n", "optim=bad", "Could not load 'optim/adamww'"),
        ("own/optim/lion.yaml", "lr: 1\n", "optim=slow", "optim/lion.yaml: an option of Weft has this name"),
    ],
)
def test_what_is_wrong_with_an_option_is_named(
    here: Path, path: str, text: str, typed: str, says: str
) -> None:
    write(path, text)
    found = refused("hydra.searchpath=[file://own]", typed)
    assert says in found[0].message


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["hydra.searchpath=[file://onw]"], "onw: no such directory"),
        (["hydra.searchpath=[file://own/optim]"], "has no folder of a group"),
        (["hydra.searchpath=own"], "give a list"),
        (["hydra.searchpath=[pkg://x]"], "give a directory, file://DIR"),
    ],
)
def test_a_directory_that_cannot_be_used_is_named(here: Path, typed: list[str], says: str) -> None:
    assert says in refused(*typed)[0].message


def test_a_directory_that_is_a_copy_of_ours_changes_nothing(here: Path) -> None:
    shutil.copytree(CONF_DIR / "optim", "copy/optim")
    assert group_options("optim", [here / "copy"]) == group_options("optim")
    assert load("hydra.searchpath=[file://copy]", "optim=lion") == load("optim=lion")


def saved(directory: str, config: RunConfig) -> str:
    """The config of a run as it is saved in its directory."""
    Path(directory).mkdir(parents=True)
    path = Path(directory) / "config.json"
    write_record(path, {VERSION_KEY: VERSION, **config.model_dump(mode="json")})
    return str(path)


def test_the_config_of_a_run_begins_another(here: Path) -> None:
    first = load("config=mine.yaml", "schedule=cosine", "train.seed=7")
    path = saved("runs/first", first)
    assert without_run_dir(load(f"config={path}", "run.dir=runs/second")) == without_run_dir(first)
    changed = load(f"config={path}", "run.dir=runs/second", "optim=adamw", "layout=swa", "optim.beta1=0.5")
    assert (changed.train.seed, changed.model.width) == (7, 64)
    assert changed.optim == load("optim=adamw", "optim.beta1=0.5").optim
    assert {layer.mixer for layer in changed.layers} == {"swa"}
    other = load(f"config={path}", "run.dir=runs/second", "model=dbrx_small")
    assert other.architecture == load("model=dbrx_small").architecture
    assert other.optim == first.optim


def test_another_run_needs_another_directory(here: Path) -> None:
    path = saved("runs/first", load())
    (missing,) = refused(f"config={path}")
    assert (missing.key, "give run.dir=DIR" in missing.message) == ("run.dir", True)
    (same,) = refused(f"config={path}", "run.dir=runs/first")
    assert "leave config= out" in same.message
    # A plan begins nothing.
    assert load(f"config={path}", world_size=None).run.dir == "runs/default"
    assert load(f"config={path}", "run.name=x").run.dir == "runs/x"


@pytest.mark.parametrize("path", sorted(SAVED.iterdir()), ids=lambda path: path.stem)
def test_configs_of_every_version_begin_runs(here: Path, path: Path) -> None:
    for number, config in enumerate(json.loads(path.read_text())):
        write(f"{number}.json", json.dumps(config))
        found = load(f"config={number}.json", "run.dir=x", world_size=None)
        assert found.optim.lr == config["optim"]["lr"]
        assert [layer.mixer for layer in found.layers]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ('{"architecture": {}}', ConfigError, "is not the config of a run; it may be that of weights"),
        ('{"train": {"steps": 3}}', ConfigError, "a part of them stands in a .yaml"),
        ("[1]", CheckpointError, "expected an object"),
        ('{"sha256": "0", "run": {}, "train": {}}', CheckpointError, "changed by hand"),
        ('{"version": 99, "run": {}, "train": {}}', CheckpointError, "newer version of Weft"),
    ],
)
def test_what_is_no_config_of_a_run_is_named(
    here: Path, text: str, error: type[Exception], says: str
) -> None:
    write("config.json", text)
    with pytest.raises(error, match=says):
        load("config=config.json", "run.dir=x")


def test_a_run_goes_on_with_a_file_that_is_as_it_was_and_sees_one_that_changed(here: Path) -> None:
    """What stands in the file counts as typed: a change of it is not passed over for the run's config."""
    line = ["config=mine.yaml", "run.dir=runs/first"]
    saved("runs/first", load(*line))
    assert load(*line).optim.lr == 3e-4
    write("mine.yaml", MINE.replace("3e-4", "0.5"))
    assert load(*line).optim.lr == 0.5


def test_preparing_data_reads_its_part_of_a_file(here: Path) -> None:
    write("mine.yaml", "data: {directory: corpora/x}\ntrain: {steps: 3}\n")
    assert compose(["config=mine.yaml"], PrepareConfig).data.directory == "corpora/x"
    write("mine.yaml", "data: {directroy: x}\ntrian: {steps: 3}\n")
    with pytest.raises(ConfigError) as caught:
        compose(["config=mine.yaml"], PrepareConfig)
    assert {violation.key for violation in caught.value.violations} >= {"data.directroy", "trian"}
