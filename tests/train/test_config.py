"""What a user mistypes comes back with its key, all of it at once, with exit code 64, in seconds."""

import random
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.compose import group_options
from conf.errors import ConfigError
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.config.saved import differences


def violations(*overrides: str, world_size: int = 1) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, world_size)
    return {violation.key: violation.message for violation in caught.value.violations}


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("optim.lrr=1", "optim.lrr", "did you mean optim.lr?"),
        ("+optim.lrr=1", "optim.lrr", "did you mean optim.lr?"),
        ('layout.pattern="3*gdn atn"', "layout.pattern", "did you mean attn?"),
        ("lr=1", "lr", "unknown key; did you mean optim.lr?"),
        ("steps=1", "steps", "did you mean train.steps or train.profile.steps?"),
        ("mixer.mla.output_gate=head", "mixer.mla.output_gate", "mixer.attn.output_gate"),
        ("optim.lr=1e400", "optim.lr", "finite"),
        ("optim.lr=nan", "optim.lr", "finite"),
        ("train.seed=9223372036854775808", "train.seed", "less than 9223372036854775808"),
        ("optim.lr=abc", "optim.lr", "valid number; found 'abc'"),
        ("train.steps=-1", "train.steps", "greater than or equal to 1; found -1"),
        ("mixer.attn.num_heads=8.0", "mixer.attn.num_heads", "valid integer; found 8.0"),
        ("mixer.gdn.key_dimm=8", "mixer.gdn.key_dimm", "did you mean mixer.gdn.key_dim?"),
        ("modle.width=8", "modle", "did you mean model?"),
        ("model=qwen3_next_smal", "model", "did you mean qwen3_next_small?"),
        ("moe.top_k=99", "moe", "top_k 99 must be at most num_experts 96"),
        ("mixer.attn.num_key_heads=3", "mixer.attn", "must be a multiple of num_key_heads 3"),
        ('layout.first="attn attn attn attn attn"', "layout", "depth is 4"),
        ("model.vocab_size=100", "model.vocab_size", "raise it to at least that"),
        ("layout.pattern=gdm", "layout.pattern", "see --help=mixer; did you mean gdn?"),
        ("precision.parameters=bfloat16", "precision", "lose small updates"),
        ("optim.kind=os.system", "optim.kind", "is not one of adamw, lion"),
        ("schedule.kind=cosin", "schedule.kind", "did you mean cosine?"),
        ("optim._target_=os.system", "optim._target_", "unknown key"),
        ("optim.lr", "optim.lr", "not a key=value override"),
        ("train.profile.ranks.one=1", "train.profile.ranks.one", "no item one in a list of 1"),
        ("model.activation=[1]", "model.activation", "keys of its own, kind, limit"),
        ("mixer.hca=5", "mixer.hca", "found 5"),
        ("optim.lr=1e-3,3e-3", "optim.lr", "a sweep over them needs -m"),
        ("optim=adamw,lion", "optim", "a sweep over them needs -m"),
        ("run.dir=runs/${USER}", "run.dir", "a variable of the environment is ${oc.env:NAME}"),
        ("run.dir='a$b'", "run.dir", "should match pattern"),
        ("slurm.env.NCCL_DEBUG=[1]", "slurm.env.NCCL_DEBUG", "found [1]"),
        ("slurm.container.image=x", "slurm.container", "a container has both or neither"),
        ("~optim", "~optim", "a group has one of its options; choose from adamw, lion"),
    ],
)
def test_each_mistake_is_named(override: str, key: str, says: str) -> None:
    found = violations(override)
    assert key in found, found
    assert says in found[key], found


def test_a_key_of_another_kind_is_not_its_own_correction() -> None:
    found = violations("schedule=cosine", "schedule.decay_fraction=0.1")
    assert "schedule.decay_fraction?" not in found["schedule.decay_fraction"]


def test_a_mapping_is_merged_into_what_its_key_refers_to() -> None:
    found = load_config(["mixer.nope.rotary_scaling={kind: yarn, factor: 3.0, original_context: 64}"], 1)
    nope, attn = (found.mixer[name].rotary_scaling for name in ("nope", "attn"))  # pyright: ignore[reportAttributeAccessIssue]
    assert nope == attn.model_copy(update={"kind": "yarn", "factor": 3.0, "original_context": 64})
    assert attn.kind == "none"


def test_one_composition_leaves_nothing_for_the_next() -> None:
    before = load_config([], 1)
    assert load_config(["optim.lr=0.25", "mixer.gdn.conv_width=3"], 1) != before
    assert load_config([], 1) == before


def test_letters_and_references_need_no_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/größe/a b")
    for typed, expected in (
        ("run.dir=runs/größe", "runs/größe"),
        ("run.dir=${oc.env:FOLDER}/x_${model.depth}_${train.seed}", "/größe/a b/x_4_0"),
        ("run.dir=größe/${oc.env:ABSENT,other}", "größe/other"),
        ("run.name=öl", "runs/öl"),
        ("+run.dir='größe, {1}'", "größe, {1}"),
    ):
        assert load_config([typed], 1).run.dir == expected


def test_all_mistakes_come_at_once() -> None:
    found = violations("optim.lr=1e400", "train.steps=-1", "mixer.gdn.key_dimm=3", "track.wandb=maybe")
    assert set(found) == {"optim.lr", "train.steps", "mixer.gdn.key_dimm", "track.wandb"}


@pytest.mark.parametrize("size", [2, 3, 8])
def test_impossible_layouts_name_legal_values(size: int) -> None:
    found = violations("parallel.dp_shard=5", "train.global_batch=7", world_size=size)
    assert f"set it to {size} or -1" in found["parallel.dp_shard"]
    assert "train.global_batch" in found


# Every model and every layout comes below.
@pytest.mark.parametrize("group", ["moe", "schedule", "precision", "track", "cluster"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for option in group_options(group):
        size = 64 if option.startswith("h") and group == "cluster" else 1
        load_config([f"{group}={option}", "train.global_batch=64"], size)


MODELS, LAYOUTS = group_options("model"), group_options("layout")


@pytest.mark.parametrize(
    ("model", "layout"),
    # All pairs would take minutes: every model and every layout comes at least once.
    [(model, LAYOUTS[index % len(LAYOUTS)]) for index, model in enumerate(MODELS)],
)
def test_any_layout_goes_on_any_model(model: str, layout: str) -> None:
    config = load_config([f"model={model}", f"layout={layout}"], 1)
    assert len(config.layers) == config.model.depth


def test_recipes_compose() -> None:
    assert load_config(["recipe=smoke"], 1).train.steps == 20
    assert load_config(["recipe=smoke", "train.steps=7"], 1).train.steps == 7


def test_the_tree_is_frozen_and_round_trips_through_json() -> None:
    import json

    config = load_config([], 1)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    again = RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config


def test_differences_name_only_what_makes_another_run() -> None:
    base = load_config([], 1).model_dump(mode="json")
    other = load_config(["optim.lr=0.5", "checkpoint.every=7", "train.evaluate_every=3"], 1)
    assert [violation.key for violation in differences(base, other.model_dump(mode="json"))] == ["optim.lr"]


@pytest.mark.parametrize("command", ["train", "train.plan", "data.prepare"])
def test_commands_exit_with_64_and_no_traceback(command: str) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", command, "data.held_out=0.9"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 64, done.stderr
    assert "data.held_out" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 30  # seconds, also on a machine that is busy with other tests


@pytest.mark.parametrize("command", ["train.sample", "train.evaluate"])
def test_readers_of_runs_name_the_missing_run(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", command, "run=/nowhere"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 64
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


WRONG = (
    *("null", "-1", "0", "1.5", "x", "''", "[]", "{}", "true", "1000000000000", "[1]", "{a:1}", "${a.b}"),
    *("${model.width}", "a b", "1e400", "nan", "-inf", '"q\'"', "[", "}", "=", "é", "9" * 30, "0x10", "%"),
    *("../..", "/", "~", "3*gdn", "${oc.env:HOME}", "'", "{a:[}", "a=b"),
)


def keys_of(tree: object, prefix: str = "") -> list[str]:
    entries = tree.items() if isinstance(tree, dict) else ()
    return [
        found for name, value in entries for found in (prefix + name, *keys_of(value, f"{prefix}{name}."))
    ]


@pytest.mark.prove
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_wrong_overrides_are_violations_and_nothing_else(seed: int) -> None:
    draw = random.Random(seed)
    keys = keys_of(load_config([], 1).model_dump(mode="json"))
    groups = (
        "model",
        "moe",
        "residual",
        "optim",
        "schedule",
        "parallel",
        "cluster",
        "recipe",
        "layout",
        "data",
    )
    overrides = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        key = draw.choice(keys) if draw.random() < 0.9 else draw.choice(groups)
        mark = draw.choice(["+", "~", "++"]) if draw.random() < 0.1 else ""
        overrides.append(f"{mark}{key[: -draw.choice([0, 0, 0, 1]) or None]}={draw.choice(WRONG)}")
    try:
        load_config(overrides, draw.choice([1, 2, 8, None]))
    except ConfigError as error:
        wrong = [violation for violation in error.violations if not (violation.key and violation.message)]
        assert not wrong, overrides
