"""`--help` shows every key of the config with its type and comment, at once and without torch."""

import importlib
import subprocess
import sys

import pytest

from conf.compose import compose_tree
from conf.errors import ConfigError
from conf.groups import groups
from conf.help import Page, answer, page_lines, question
from conf.key_types import key_type
from conf.keys import default_option, is_spread, options, sections, shared_keys
from conf.overrides import overrides_of
from train.__main__ import PAGE
from train.config.fields import RunDraft

COMMANDS = (
    *("train.__main__", "train.check", "train.plan", "train.rehearse", "train.evaluate", "train.sample"),
    *("train.export", "train.resolve", "data.prepare", "slurm.submit", "slurm.settings", "model.hf.__main__"),
    *("kernels.check", "kernels.compiled"),
)


def shown(section: str) -> str:
    return answer(f"--help={section}", PAGE)


def asked_sections() -> list[str]:
    """What a reader can ask for: the parts of the config, each mixer by itself."""
    return [*sections(), *(f"mixer.{option.name}" for option in options("mixer"))]


def test_every_key_of_the_config_is_shown() -> None:
    lines = [line for part in asked_sections() for line in shown(part).splitlines()]
    words = {line.split()[0].split("=")[0] for line in lines}
    tree = {name: value for name, value in compose_tree([]).items() if name != "hydra"}
    keys = [override.split("=")[0] for override in overrides_of(tree)]
    # A reference to a node stands for all keys below it.
    missing = [key for key in keys if not {key, key.rpartition(".")[0]} & words]
    assert len(keys) > 300
    assert missing == []


@pytest.mark.parametrize("group", groups())
def test_every_key_and_every_option_says_what_it_is(group: str) -> None:
    for option in options(group):
        assert option.about, option.name
        if not is_spread(group) or option.name == default_option(group):
            bare = [key.name for key in option.keys if not key.comment and key.value is not None]
            assert bare == [], option.name
    assert [key.name for key in shared_keys(group) if not key.comment and key.value is not None] == []


@pytest.mark.parametrize("part", sorted(set(sections()) - set(groups())))
def test_every_key_of_no_group_has_a_comment(part: str) -> None:
    assert [key.name for key in shared_keys(part) if not key.comment and key.value is not None] == []


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("optim", "optim.lr=0.005                      number > 0"),
        ("optim.lr", "peak learning rate, > 0"),
        ("optim", "optim=lion: Lion: updates of one size"),
        ("optim", "optim.lr_scales={}                  mapping of names to number >= 0"),
        ("parallel", "parallel.pp_chunks=null             whole number >= 1, or null"),
        ("parallel.zero", "parallel.zero.stage=2               1, 2 or 3"),
        ("model.mtp", "model.mtp.depth=0                   whole number >= 0"),
        ("model", "model=mixtral_8x7b: "),
        ("mixer.gdn", "mixer.gdn.conv_width=4              whole number"),
        ("data.tokenizer", "data.tokenizer.vocab_size=4096      whole number >= 2, <= 1000000"),
        ("data", "data.directory=???                  text, to be given"),
        ("train", "train.seed=0                        whole number >= 0"),
        ("recipe", "recipe=smoke: Seconds on a laptop"),
    ],
)
def test_a_section_shows_types_ranges_and_defaults(section: str, line: str) -> None:
    assert line in shown(section)


def test_options_after_the_first_show_what_they_change() -> None:
    other = shown("optim").split("optim=lion:")[1]
    assert "optim.beta2=0.99" in other
    assert "optim.clip_norm" not in other


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("optin", "did you mean optim?"),
        ("optim.lrr", "did you mean optim.lr?"),
        ("mixer.gdm", "no such key or part of mixer"),
        ("zzzzzz", "there are checkpoint, cluster"),
    ],
)
def test_an_unknown_section_is_named(section: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shown(section)
    (violation,) = caught.value.violations
    assert violation.key == f"--help={section}"
    assert says in violation.message


def test_a_command_without_a_config_says_so() -> None:
    with pytest.raises(ConfigError, match="takes no config"):
        answer("--help=optim", Page("", ()))
    with pytest.raises(ConfigError, match="reads no optim; it reads data"):
        answer("--help=optim", Page("", (), sections=lambda: ("data",)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_with_examples(name: str) -> None:
    module = importlib.import_module(name)
    lines = list(page_lines(module.PAGE))
    command = f"python -m {name.removesuffix('.__main__')}"
    assert command in lines[0]
    examples = lines[lines.index("Examples") + 1 :]
    assert examples[0].strip().startswith(command)
    assert all(len(line) <= 112 for line in lines)


def test_questions_are_told_from_work() -> None:
    assert question(["optim.lr=1", "--help=optim"]) == "--help=optim"
    assert question(["-h"]) == "-h"
    assert question(["-m", "optim.lr=1,2", "--cfg", "job", "--hydra-help"]) is None


def test_types_follow_the_kind() -> None:
    assert key_type(RunDraft, ("optim", "eps"), "adamw") == "number > 0"
    assert key_type(RunDraft, ("schedule", "kind"), "cosine") == "cosine"
    assert key_type(RunDraft, ("mixer", "gdn", "key_dim"), None) is None


# What starts slowly; a page is read while one thinks.
WATCH = """
import runpy, sys
sys.argv = ["x", {asked!r}]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
slow = {{"torch", "hydra", "triton", "transformers"}} & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.parametrize(
    ("module", "asked"),
    [
        ("train", "--help=optim"),
        ("model.hf", "--help"),
        ("train.plan", "--version"),
        ("kernels.check", "--help"),
    ],
)
def test_nothing_slow_is_imported(module: str, asked: str) -> None:
    command = [sys.executable, "-c", WATCH.format(module=module, asked=asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_reader_that_leaves_early_ends_it_quietly() -> None:
    command = f"{sys.executable} -m train --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("python -m train")
