"""A run that an older version started goes on: each key that came, went or moved since has a rule."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.compose import validate
from conf.errors import CheckpointError, ConfigError
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.config.versions import RULES, VERSION, VERSION_KEY, Added, Removed, Renamed, upgraded

SAVED = Path(__file__).parent / "saved_configs"
# Keys of one kind of optimizer, schedule and residual are not keys of another.
FORMS = (
    (),
    ("optim=lion", "schedule=wsd"),
    ("residual=hyper", "model=deepseek_v4_flash"),
)


def plain(form: tuple[str, ...]) -> dict[str, Any]:
    """The config that a version saves."""
    config = load_config((*form, "cluster.nodes=32", "cluster.gpus_per_node=8"), None)
    return {VERSION_KEY: VERSION, **config.model_dump(mode="json")}


@pytest.mark.parametrize("path", sorted(SAVED.iterdir()), ids=lambda path: path.stem)
def test_configs_of_every_version_have_the_keys_of_today(path: Path) -> None:
    for saved in json.loads(path.read_text()):
        try:
            # No key may be missing, and none unknown.
            validate(RunConfig, upgraded(saved, "config.json"))
        except ConfigError as error:
            raise AssertionError(
                "a key of the run config came, went or moved: say so in train/config/versions.py with the "
                "next version, and save what it writes: python -m tests.train.test_versions"
            ) from error


def test_the_newest_version_is_saved() -> None:
    assert (SAVED / f"{VERSION}.json").exists(), "python -m tests.train.test_versions"
    assert [rule.version for rule in RULES] == sorted(rule.version for rule in RULES)


names = st.sampled_from("abcdef")


@given(st.integers(0, 9), st.integers(1, 9), st.integers(), st.integers())
def test_a_rule_holds_for_what_is_older_than_it(version: int, since: int, old: int, value: int) -> None:
    rules = (
        Added(since, "group.new", value),
        Renamed(since, "group.old", "other.moved"),
        Removed(9, "x", value),
    )
    saved = {VERSION_KEY: version, "group": {"old": old}, "other": {}, "x": value}
    expected: dict[str, Any] = {"group": {"old": old}, "other": {}, "x": value}
    if version < since:
        expected |= {"group": {"new": value}, "other": {"moved": old}}
    if version < 9:
        del expected["x"]
    assert upgraded(saved, "here", rules) == expected
    assert saved == {VERSION_KEY: version, "group": {"old": old}, "other": {}, "x": value}, (
        "nothing is mutated"
    )


def test_what_a_rule_adds_is_no_more_than_what_is_missing() -> None:
    saved = {"group": {"new": 1}}
    assert upgraded(saved, "here", (Added(1, "group.new", 2), Added(1, "absent.key", 3))) == saved


def test_a_value_that_nothing_does_any_more_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"group\.old: runs/a/config\.json: .* 3, and .* only what 2 was"):
        upgraded({"group": {"old": 3}}, "runs/a/config.json", (Removed(1, "group.old", 2),))


@pytest.mark.parametrize("version", [VERSION + 1, "x", None])
def test_a_newer_version_is_named(version: Any) -> None:
    with pytest.raises(CheckpointError, match=f"keys are of version {version}, this one knows {VERSION}"):
        upgraded({VERSION_KEY: version}, "config.json")


if __name__ == "__main__":
    SAVED.mkdir(exist_ok=True)
    (SAVED / f"{VERSION}.json").write_text(json.dumps([plain(form) for form in FORMS]) + "\n")
