"""Fields that a config.json leaves out: what transformers takes for them, or refused; no defaults of ours."""

import json
import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from conf.compose import compose
from conf.errors import CheckpointError, ConfigError
from model.config import Architecture
from model.hf.family import families
from model.hf.fields import Fields
from model.hf.parts import rotary_lines
from model.hf.pretrained import load_pretrained, save_pretrained
from model.mixers.attn import AttnConfig
from model.rotary import rotary_table
from tests.architectures import random_model, small_architecture
from tests.closeness import SAME, assert_close, in_float64
from tests.model.hf.draws import drawn_families, fit
from tests.model.hf.test_families import logits_of, open_theirs

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = drawn_families()
CONTEXT = 40
# Fields that transformers fills in against another one: in MiniMax-M3 it goes by the other one, and in DBRX
# it does not see the published one. We refuse both together.
MADE_UP = {"rotary_dim": ("minimax_m3_vl", "minimax_m3_vl_text"), "rope_parameters": ("dbrx",)}
# Of the text model in a whole one, which goes by what the whole one says.
TIED = "tie_word_embeddings"


@cache
def drawn(name: str, count: int) -> list[list[str]]:
    """The first small configs of the family, the same in every run."""
    found: list[list[str]] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(FAMILIES[name].overrides)
    def draw(overrides: list[str]) -> None:
        found.append(overrides)

    draw()
    return found


def written(name: str, overrides: list[str]) -> dict[str, Any]:
    """A config.json of the family, with the context that stretches of positions are counted from."""
    found = {"model_type": name, **families()[name].write(small_architecture(overrides))}
    text_of(found)["max_position_embeddings"] = CONTEXT
    return found


def text_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The part that speaks of the text model."""
    for key in ("thinker_config", "text_config"):
        fields = fields.get(key, fields)
    return fields


def paths(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def without(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    found = deepcopy(tree)
    node = found
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return found


def has(tree: Any, path: tuple[str, ...]) -> bool:
    return not path or (isinstance(tree, dict) and path[0] in tree and has(tree[path[0]], path[1:]))


def cut_to(theirs: dict[str, Any], ours: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Theirs without the fields that ours does not write, under the names that it writes."""
    renamed = {aliases[key]: value for key, value in theirs.items() if key in aliases} | theirs
    return {
        key: cut_to(renamed[key], value, aliases)
        if isinstance(value, dict) and isinstance(renamed[key], dict)
        else renamed[key]
        for key, value in ours.items()
        if key in renamed
    }


def understood(name: str, fields: dict[str, Any]) -> dict[str, float | str]:
    """Our keys and values; those of modules that logits do not see are left out."""
    family = families()[name]
    reader = Fields(fields, name, family.aliases)
    with reader.reading():
        overrides = family.read(reader)
    pairs = (line.partition("=") for line in overrides)
    return {key: number(value) for key, _, value in pairs if not key.startswith("model.mtp.")}


def number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


# Families that transformers has under the name of another one, which is judged.
OTHER_NAMES = {"minimax_text_01", "minimax_m1", "kimi_k2"}


def known_to_transformers(name: str) -> Any:
    """transformers' config class; None where it knows the family by no name of its own."""
    from transformers import logging as their_logging
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    their_logging.set_verbosity(logging.ERROR)
    try:
        return CONFIG_MAPPING[name]
    except KeyError:
        return None


def absences(name: str, overrides: list[str]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every field that can be left out, and the config without it."""
    full = written(name, overrides)
    for path in paths(full):
        if path[-1] not in ("model_type", "max_position_embeddings"):
            yield path, without(full, path)


def test_every_absent_field_is_what_transformers_fills_in() -> None:
    wrong, checked = [], 0
    for name in sorted(FAMILIES):
        assert (known_to_transformers(name) is None) == (name in OTHER_NAMES)
        if name in OTHER_NAMES:
            continue
        for overrides in drawn(name, 2):
            full = written(name, overrides)
            for path, fields in absences(name, overrides):
                is_inner_tie = path[-1] == TIED and len(path) > 1 and families()[name].nested is not None
                if is_inner_tie or name in MADE_UP.get(path[-1], ()):
                    continue
                both = ours_and_filled(name, fields, full)
                if both is None or not has(both[1], path):
                    continue
                checked += 1
                found = understood_or_why(name, both[1] | {"model_type": name})
                if found != both[0]:
                    wrong.append((name, ".".join(path), _difference(both[0], found)))
    assert not wrong
    assert checked > 1000


def ours_and_filled(name: str, fields: dict[str, Any], full: dict[str, Any]) -> Any:
    """What we understand, and the fields as transformers fills them in; None where either refuses."""
    ours = understood_or_why(name, fields)
    try:
        filled = known_to_transformers(name).from_dict(deepcopy(fields)).to_dict()
    except Exception:  # of many kinds: it is no judge of what it does not run
        return None
    return None if isinstance(ours, str) else (ours, cut_to(filled, full, families()[name].aliases))


def understood_or_why(name: str, fields: dict[str, Any]) -> dict[str, float | str] | str:
    """What we understand, or why we refuse."""
    try:
        return understood(name, fields)
    except CheckpointError as error:
        return str(error)


def _difference(ours: dict[str, Any], found: Any) -> Any:
    if isinstance(found, str):
        return found
    return {
        key: (ours.get(key), found.get(key))
        for key in ours.keys() | found.keys()
        if ours.get(key) != found.get(key)
    }


YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
    **{"beta_fast": 9.0, "beta_slow": 3.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.9},
}
# What the mixer has before the config of the hub is read.
OWN = ("original_context=64", "beta_fast=50.0", "beta_slow=5.0", "truncates=false", "attention_factor=3.0")


@pytest.mark.parametrize("absent", [None, *sorted(YARN.keys() - {"rope_type", "rope_theta", "factor"})])
def test_a_stretch_without_a_field(absent: str | None) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {key: value for key, value in YARN.items() if key != absent}
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "head_dim": 64, "max_position_embeddings": 2048}
    theirs = Qwen3MoeConfig(**sizes, rope_parameters=deepcopy(rope))
    frequencies, amplitude = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    found = rotary_lines(Fields({**sizes, "rope_parameters": rope}, "config.json"), "attn")
    own = [f"mixer.attn.rotary_scaling.{line}" for line in OWN]
    attn = compose([*own, *found], Architecture).mixer["attn"]
    assert isinstance(attn, AttnConfig)
    cosines, sines = rotary_table(torch.tensor([[1]]), 64, attn.rotary_theta, attn.rotary_scaling)
    torch.testing.assert_close(cosines[0, 0], frequencies.cos() * amplitude)
    torch.testing.assert_close(sines[0, 0], frequencies.sin() * amplitude)


@pytest.mark.prove
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - OTHER_NAMES))
def test_a_field_that_transformers_fills_in_as_it_runs(name: str, tmp_path: Path) -> None:
    for number_of, overrides in enumerate(drawn(name, 2)):
        model = random_model(small_architecture(overrides), torch.float32)
        fit(model, name)
        tokens = torch.randint(model.config.model.vocab_size, (2, 60))
        full = written(name, overrides)
        source = tmp_path / str(number_of)
        save_pretrained(model, source, model_type=name)
        for index, (path, fields) in enumerate(absences(name, overrides)):
            both = ours_and_filled(name, fields, full)
            if both is None or has(both[1], path):
                continue
            directory = tmp_path / f"{number_of}_{index}" / "ours"
            directory.mkdir(parents=True)
            (directory / "config.json").write_text(json.dumps(full_of(source, fields)))
            (directory / "model.safetensors").hardlink_to(source / "model.safetensors")
            compare(name, directory, tokens, path)


def full_of(source: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, with those that every config has."""
    return {
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "architectures": json.loads((source / "config.json").read_text())["architectures"],
        "dtype": "float32",
        **fields,
    }


def compare(name: str, directory: Path, tokens: torch.Tensor, path: tuple[str, ...]) -> None:
    """Logits of both, where both read the directory."""
    try:
        ours = load_pretrained(directory, torch.float64)
    except (CheckpointError, ConfigError):
        return
    with in_float64():
        try:
            model, problems = (FAMILIES[name].open or open_theirs)(directory)
            expected = logits_of(model, tokens)
        except Exception:  # of many kinds: it is no judge of what it does not run
            return
        if any(problems.values()):
            return
        ours.dtype = torch.float64
        found = ours(tokens)
    assert_close([found], [expected.detach()], SAME, names=[".".join(path)])
