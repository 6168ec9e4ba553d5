"""The update of a run against AdamW written by hand in float64: its schedule, groups, clipping and decay."""

from pathlib import Path

import pytest
import torch

from parallel.config.degrees import Degrees
from tests.parallel.by_hand import CLIP, KEYS, Expected, by_hand, differing, trained
from tests.parallel.equality import config_of
from tests.worlds import run_world
from train.config.run_config import RunConfig


@pytest.fixture(scope="module")
def config(short_documents: Path) -> RunConfig:
    return config_of("gdn attn", "float64", short_documents, *KEYS, "layout.ffn.pattern=dense")


@pytest.fixture(scope="module")
def expected(config: RunConfig) -> Expected:
    return by_hand(config, [torch.get_rng_state()])


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(dp_shard=2), Degrees(tp=2)], ids=["1", "dp2", "tp2"])
def test_weights_after_some_steps_are_those_of_adamw(
    config: RunConfig, expected: Expected, degrees: Degrees
) -> None:
    ranks = run_world(degrees.size, trained, config, degrees, timeout=200)
    assert ranks[0].norms == pytest.approx(expected.norms, rel=1e-10)
    # Some steps are clipped and some are not.
    assert min(expected.norms) < 0.95 * CLIP < 1.05 * CLIP < max(expected.norms)
    assert not differing(ranks, expected, 1e-9)
