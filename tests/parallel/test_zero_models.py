"""Models beside DeepSpeed's ZeRO: every mixer, frozen parameters, streams, other numbers of ranks."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from parallel.config.degrees import Degrees
from parallel.config.zero import ZeroConfig
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from tests.parallel.equality import (
    MIXERS,
    PATTERNS,
    Job,
    Run,
    config_of,
    run,
)
from tests.parallel.test_zero import FORMS, with_zero
from tests.parallel.truth import decided, true_runs
from tests.worlds import run_world
from train.config.environment import prepare_deepspeed
from train.config.run_config import RunConfig

SECONDS = 400
EXPERTS = ("moe=sigmoid", "moe.num_experts=8", "moe.bias_rate=0.05")
# Nothing before a trained parameter needs a gradient, nothing behind it has one of its own, or both.
FROZEN = {
    "the first layer": ("optim.lr_scales={*norm*:0.5,embed.*:0.0,blocks.0.*:0.0}",),
    "the last layer and a table used twice": (
        "model.has_tied_embeddings=true",
        "optim.lr_scales={embed.*:0.0,blocks.1.*:0.0}",
    ),
    "experts": ("optim.lr_scales={*experts*:0.0,*router*:0.0}",),
}
# All but indexers, whose losses reach nothing else.
WARM_UP = ("recipe=dsa_warmup", "optim.clip_norm=0.00001", "train.steps=4", "train.global_batch=4")
# Groups of the optimizer with fewer numbers than ranks, or not as many times as many.
TINY = "optim.lr_scales={blocks.0.mixer.decay.A_log:0.5,blocks.1.mixer.q_norm.weight:0.25}"
MTP = ("model.mtp.depth=1", "model.has_tied_embeddings=true")


def zero_runs(
    rank: int, size: int, configs: Mapping[str, RunConfig], forms: Mapping[str, ZeroConfig]
) -> dict[tuple[str, str], Run]:
    """The runs of this rank by config and form, in processes that import DeepSpeed once."""
    prepare_deepspeed(rank)
    degrees = Degrees(dp_shard=size)
    world = World(rank, size, torch.device("cpu"), open_axes(degrees, rank))
    return {
        (name, form): run(Job(with_zero(config, zero), degrees), world)
        for name, config in configs.items()
        for form, zero in forms.items()
    }


def check(configs: Mapping[str, RunConfig], forms: Mapping[str, ZeroConfig], size: int) -> None:
    """Asserts that every form trains every config as one process does in float64, up to rounding."""
    true = dict(zip(configs, true_runs([*configs.values()], SECONDS), strict=True))
    ranks = run_world(size, zero_runs, configs, forms, timeout=SECONDS)
    assert len(ranks[0]) == len(configs) * len(forms)
    for name, form in ranks[0]:
        true[name].check([rank[name, form] for rank in ranks], f"{name}, {form}")


@pytest.mark.equality
@pytest.mark.timeout(3 * SECONDS)
def test_every_mixer_trains_with_its_weights_gathered_while_they_are_used(short_documents: Path) -> None:
    drawn = [config_of(PATTERNS[mixer], "float32", short_documents) for mixer in MIXERS]
    configs = dict(zip(MIXERS, decided(drawn, SECONDS), strict=True))
    check(configs, {"stage 3": FORMS["stage 3"]}, 2)


@pytest.mark.prove
def test_frozen_parameters_stay_and_the_rest_learns(short_documents: Path) -> None:
    configs = {
        name: config_of("gdn attn", "float32", short_documents, *EXPERTS, *keys)
        for name, keys in FROZEN.items()
    }
    configs["all but indexers"] = config_of("dsa attn", "float32", short_documents, *EXPERTS, *WARM_UP)
    check(configs, FORMS, 2)


@pytest.mark.prove
@pytest.mark.parametrize("size", [1, 3])
def test_other_numbers_of_ranks(short_documents: Path, size: int) -> None:
    more = (*EXPERTS, TINY, f"train.global_batch={2 * size}")
    check({"tiny groups": config_of("gdn attn", "float32", short_documents, *more)}, FORMS, size)


@pytest.mark.prove
def test_streams_predictions_and_recomputing(short_documents: Path) -> None:
    def config(*more: str) -> RunConfig:
        return config_of("gdn attn", "float32", short_documents, *EXPERTS, *more)

    streams = {"streams": config("residual=hyper", *MTP), "sandwich": config("residual=sandwich", *MTP)}
    check(streams, FORMS, 2)
    again = {name: config(f"parallel.recompute={name}") for name in ("full", "gdn moe")}
    check(again, {form: zero for form, zero in FORMS.items() if zero.stage < 3}, 2)
