"""One model of what layouts treat apart, in each layout, beside training by hand in float64.

Routed experts that weigh their input and have biases, layers that route by token id, biases on both sides of
attention, sinks, a table that both ends of a pipeline share, two MTP modules, and dropout.
"""

from pathlib import Path

import pytest
import torch

from parallel.config.degrees import Degrees
from tests.parallel.by_hand import KEYS, Expected, by_hand, differing, trained
from tests.parallel.equality import config_of
from tests.worlds import run_world
from train.config.run_config import RunConfig

LIMIT = 1e-9
STEPS = 3
CLIP = 1.25  # some steps are clipped and some are not
MICRO_BATCHES = 2
MODEL = (
    *("layout.ffn.pattern=hash moe moe dense", "moe.scales_input=true", "moe.has_bias=true"),
    *("moe.has_router_bias=true", "mixer.attn.has_bias=true", "mixer.attn.has_output_bias=true"),
    *("mixer.attn.has_sinks=true", "model.has_tied_embeddings=true", "model.mtp.depth=2"),
    *(f"optim.clip_norm={CLIP}", "model.mtp.coefficient=0.7", "model.width=16", "train.global_batch=8"),
)
LAYOUTS = {
    "tp2-ep2": (Degrees(tp=2, ep=2), "1f1b"),
    "pp2": (Degrees(pp=2), "1f1b"),
}
MORE_LAYOUTS = {
    "ep2": (Degrees(dp_shard=2, ep=2), "1f1b"),
    "tp2": (Degrees(tp=2), "1f1b"),
    "cp2": (Degrees(cp=2), "1f1b"),
    "cp2-tp2-ep4": (Degrees(cp=2, tp=2, ep=4), "1f1b"),
    "pp2-tp2-zero_bubble_v": (Degrees(pp=2, tp=2), "zero_bubble_v"),
    "pp2-shard2-ep2-zero_bubble_v": (Degrees(pp=2, dp_shard=2, ep=2), "zero_bubble_v"),
    "replicate2-shard2-ep2": (Degrees(dp_replicate=2, dp_shard=2, ep=2), "1f1b"),
}
# Ranks that have whole rows: each draws for its own, over all layers of one micro-batch after the other.
DROPPING = {
    "replicate2": Degrees(dp_replicate=2),
    "replicate2-shard2-ep2": Degrees(dp_replicate=2, dp_shard=2, ep=2),
}
DROPPING_CASES = ["replicate2", pytest.param("replicate2-shard2-ep2", marks=pytest.mark.prove)]


def model_of(dataset: Path, *more: str) -> RunConfig:
    return config_of("attn gdn attn attn", "float64", dataset, *KEYS, *MODEL, *more)


@pytest.fixture(scope="module")
def expected(short_documents: Path) -> Expected:
    return by_hand(model_of(short_documents), [torch.get_rng_state()], MICRO_BATCHES, STEPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_by_hand(layout: str, short_documents: Path, expected: Expected) -> None:
    check(*LAYOUTS[layout], short_documents, expected)


@pytest.mark.prove
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_more_layouts_train_as_by_hand(layout: str, short_documents: Path, expected: Expected) -> None:
    check(*MORE_LAYOUTS[layout], short_documents, expected)


def check(degrees: Degrees, schedule: str, dataset: Path, expected: Expected) -> None:
    config = model_of(dataset, f"parallel.pp_schedule={schedule}")
    ranks = run_world(degrees.size, trained, config, degrees, STEPS, timeout=400)
    for rank in ranks:
        assert rank.losses == pytest.approx(expected.losses, rel=LIMIT)
        assert rank.norms == pytest.approx(expected.norms, rel=LIMIT)
    assert min(expected.norms) < 0.95 * CLIP < 1.02 * CLIP < max(expected.norms)
    assert not differing(ranks, expected, LIMIT)


@pytest.mark.parametrize("layout", DROPPING_CASES)
def test_copies_drop_apart_and_accumulate(layout: str, short_documents: Path) -> None:
    degrees, config = DROPPING[layout], model_of(short_documents, "residual.dropout=0.2")
    ranks = run_world(degrees.size, trained, config, degrees, STEPS, timeout=400)
    assert len({rank.random.numpy().tobytes() for rank in ranks}) == degrees.size
    expected = by_hand(config, [rank.random for rank in ranks], MICRO_BATCHES, STEPS)
    assert ranks[0].losses == pytest.approx(expected.losses, rel=LIMIT)
    assert ranks[0].norms == pytest.approx(expected.norms, rel=LIMIT)
    assert not differing(ranks, expected, LIMIT)
