"""Checkpoints that are wrong somewhere: one error that says where, or weights that are what they say."""

import random
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.errors import CheckpointError
from model.hf.__main__ import main
from model.hf.pretrained import load_pretrained, save_pretrained
from tests.architectures import random_model, small_architecture
from tests.damage import damage_bytes, damage_json
from tests.model.hf.draws import drawn_families, fit

FAMILIES = drawn_families()


@cache
def written(name: str, root: Path) -> Path:
    """A directory of the family, in several shards."""
    found: list[list[str]] = []

    @settings(max_examples=1, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(FAMILIES[name].overrides)
    def draw(overrides: list[str]) -> None:
        found.append(overrides)

    draw()
    model = random_model(small_architecture(found[0]), torch.float32)
    fit(model, name)
    save_pretrained(model, root / name, model_type=name, shard_bytes=60_000)
    return root / name


@pytest.mark.prove
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**32))
def test_a_wrong_checkpoint_is_refused_in_one_line_or_read_as_it_is(
    name: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "written"
    root.mkdir(exist_ok=True)
    draw, path = random.Random(seed), tmp_path_factory.mktemp("wrong")
    shutil.copytree(written(name, root), path / "hub")
    file = draw.choice([path / "hub" / "config.json"] * 3 + sorted((path / "hub").iterdir()))
    before = {each: each.read_bytes() for each in sorted((path / "hub").iterdir()) if each != file}
    # The head of a file of weights says where they stand; a weight that is another one is as good a weight.
    (damage_json if file.suffix == ".json" else partial(damage_bytes, head=600))(file, draw)
    # Any other error than this one fails.
    try:
        main(["import", str(path / "hub"), str(path / "ours")])
    except CheckpointError:
        assert {each.name for each in path.iterdir()} == {"hub"}
    else:
        ours, hub = (load_pretrained(path / where).state_dict() for where in ("ours", "hub"))
        torch.testing.assert_close(ours, hub, rtol=0, atol=0, equal_nan=True)
    assert {each: each.read_bytes() for each in before} == before
