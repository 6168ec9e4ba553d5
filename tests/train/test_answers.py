"""A mistyped config is answered at once and with what is legal in it, whichever command it is typed for."""

import subprocess
import sys

import pytest

from conf.errors import ConfigError
from conf.groups import group_options
from conf.names import MOST, listed
from train.config.checks import mixer_key_violations
from train.config.load import load_config

# Runs a command; says which slow packages its process had imported when it ended.
WATCH = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    slow = {"torch", "triton", "transformers", "datasets"} & set(sys.modules)
    print("code", ended.code, "slow", *sorted(slow), file=sys.stderr)
"""


def violations(*overrides: str, world_size: int | None = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, world_size)
    return {violation.key: violation.message for violation in caught.value.violations}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train optim.lrr=1", "optim.lr?"),
        ("train mixer.mla.output_gate=head", "mixer.attn.output_gate"),
        ("train mixer.gdn.key_dimm=1 parallel.tp=3", "mixer.gdn.key_dim?"),
        ("train config=nowhere.yaml", "no such file"),
        ("train --config-dir nowhere", "no such directory"),
        ("train -m optim.lrr=1,2", "optim.lr?"),
        ("train -m optim.lr=1 parallel.tp=3", "parallel.tp"),
        ("train.check parallel.tp=3", "parallel.tp"),
        ("train.plan optim.lrr=1", "optim.lr?"),
        ("train.rehearse optim.lrr=1", "optim.lr?"),
        ("train.resolve optim.lrr=1", "optim.lr?"),
        ("train.resolve --check optim.lrr=1", "optim.lr?"),
        ("train.evaluate rum=1", "run?"),
        ("train.sample rum=1", "run?"),
        ("train.export rum=1", "run?"),
        ("slurm.submit model.widht=1 --dry-run", "model.width?"),
        ("slurm.settings model.widht=1", "model.width?"),
        ("data.prepare data.held=1", "data.held_out?"),
        ("model.hf import a b dtyp=1", "dtype?"),
        ("kernels.check nrm", "norm?"),
        ("kernels.compiled atention.full", "attention?"),
    ],
)
def test_a_typo_is_answered_before_anything_slow_is_imported(command: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *command.split()],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    *said, last = done.stderr.splitlines()
    assert says in "\n".join(said), done.stderr
    assert last == "code 64 slow"


@pytest.mark.parametrize(
    ("typed", "key", "says"),
    [
        (["width=512"], "width", "unknown key; did you mean model.width?"),
        (["tp=2"], "tp", "unknown key; did you mean parallel.tp?"),
        (["train.lr=1"], "train.lr", "unknown key; did you mean optim.lr?"),
        (["wdith=1"], "wdith", "unknown key; did you mean model.width?"),
        (["data.lrr=1"], "data.lrr", "unknown key; did you mean optim.lr?"),
        (["zzz=1"], "zzz", "unknown key"),
        (
            ["schedule=cosine", "schedule.decay_fraction=0.1"],
            "schedule.decay_fraction",
            "no key of the schedule that is chosen; schedule=wsd has it",
        ),
        (
            ["optim=lion", "optim.eps=1"],
            "optim.eps",
            "no key of the optim that is chosen; optim=adamw has it",
        ),
    ],
)
def test_an_unknown_key_is_answered_by_keys_that_are_legal(typed: list[str], key: str, says: str) -> None:
    assert violations(*typed) == {key: says}


def test_every_key_that_an_answer_proposes_can_be_typed() -> None:
    message = violations("mixer.mla.output_gate=head")["mixer.mla.output_gate"]
    proposed = [word.strip(",?") for word in message.split() if word.startswith("mixer.")]
    assert len(proposed) == 3
    for key in proposed:
        assert "unknown" not in str(load_config([f"{key}=head"], 1).mixer[key.split(".")[1]])


def test_the_files_of_mixers_have_every_key_of_their_kind() -> None:
    """Without torch a key of a mixer is known by its file alone."""
    config = load_config([], 1)
    for name, mixer in config.mixer.items():
        node = mixer.model_dump(mode="json")
        assert mixer_key_violations({name: node}) == []
        (found,) = mixer_key_violations({name: {**node, "keyy": 1}})
        assert found.key == f"mixer.{name}.keyy"


def test_violations_of_every_part_come_at_once() -> None:
    typed = ["optim.lrr=1", "train.steps=-1", "layout.pattern=gdm", "parallel.tp=3", "parallel.ep=7"]
    found = violations(
        *typed, "cluster=h100_8n", "parallel.dp_shard=0", "parallel.prefetch=1", "parallel.pp=2"
    )
    wanted = {"optim.lrr", "train.steps", "layout.pattern", "data.sequence_length"}
    wanted |= {f"parallel.{name}" for name in ("tp", "ep", "dp_shard", "prefetch")}
    assert set(found) == wanted


def test_a_long_list_of_names_is_cut_to_those_that_may_be_meant() -> None:
    message = violations("model=qwen3_next_smal")["model"]
    assert len(message) < 200
    assert "qwen3_next_small" in message
    assert f"and {len(group_options('model')) - 4} more, see --help=model; did you mean" in message
    names = [f"name{number}" for number in range(MOST)]
    assert listed(names, "x") == ", ".join(names)


def test_a_batch_that_nobody_typed_is_a_multiple_of_the_micro_batch_that_somebody_did() -> None:
    for micro, batch in ((1, 2), (2, 2), (3, 3), (5, 5)):
        config = load_config([f"train.micro_batch={micro}"], 1)
        assert (config.train.global_batch, config.train.micro_batch) == (batch, micro)
