"""Weights of blocks to come are gathered while one computes, and nothing else changes."""

from collections.abc import Mapping
from typing import Any

import pytest

from conf.errors import ConfigError
from model.config import Architecture
from model.language_model import LanguageModel
from parallel.config.degrees import Degrees
from parallel.context.sharding import cut_rows
from parallel.rehearsal.collective_trace import CollectiveTrace
from tests.parallel.layouts import (
    alone,
    apart,
    architecture_of,
    assembled,
    batch_of,
    build,
    denominators_of,
    on_rank,
)
from tests.worlds import run_world
from train.config.load import load_config
from train.estimate.memory import memory_per_rank

DEPTH = 4
SHARDS = Degrees(dp_shard=4, ep=2)


@pytest.mark.parametrize("prefetch", [1, 9])
def test_losses_and_gradients_are_those_of_one_process(prefetch: int) -> None:
    config = architecture_of(mixers=("gdn", "attn", "csa", "gdn"))
    reference = alone(config)
    ranks = run_world(4, on_rank, config, SHARDS, "", {"prefetch": prefetch}, timeout=300)
    found = assembled(reference, ranks)
    assert found.losses.keys() == reference.losses.keys()
    assert found.grads.keys() == reference.grads.keys()
    for name, grad in found.grads.items():
        assert apart(grad, reference.grads[name]) < 1e-12, name


def gathers(
    rank: int, size: int, config: Architecture, keys: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """How many gathers were begun when each block's mixer was done, in forward and in backward."""
    built, world = build(config, Degrees(dp_shard=size), rank, keys)
    model = built.whole
    assert isinstance(model, LanguageModel)
    batch = batch_of(config.model.vocab_size)
    rows = type(batch)(*(part[rank::size] for part in batch))
    counts = denominators_of(batch, config)
    forward: list[int] = []
    backward: list[int] = []
    with CollectiveTrace() as trace:

        def begun(into: list[int]) -> None:
            into.append(sum(call.kind == "all_gather" for call, _ in trace.found))

        for block in model.blocks:
            mixer = block.get_submodule("mixer")
            mixer.register_forward_hook(lambda *_: begun(forward))
            mixer.register_full_backward_pre_hook(lambda *_: begun(backward))
        built.runner.step([cut_rows(rows, world.axes.cp, uniform=0.3)], counts)
    return forward, backward


def test_gathers_of_later_blocks_are_begun_earlier() -> None:
    config = architecture_of(mixers=("gdn",) * DEPTH)
    for forward, backward in run_world(2, gathers, config, {"prefetch": 0}):
        # Of the root and the block itself; in backward FSDP2 gathers the next by itself.
        assert forward == [2, 3, 4, 5]
        assert backward == [7, 8, 9, 9]
    for forward, backward in run_world(2, gathers, config, {"prefetch": 2}):
        assert forward == [4, 5, 5, 5]
        assert backward == [8, 9, 9, 9]


def test_a_pipeline_refuses_it_and_the_plan_counts_it() -> None:
    sharded = ["cluster.nodes=1", "cluster.gpus_per_node=8", "train.global_batch=32"]
    with pytest.raises(ConfigError, match=r"parallel\.prefetch: 1 is not for stages"):
        load_config([*sharded, "parallel.pp=2", "train.micro_batch=1", "parallel.prefetch=1"], 8)
    plans = [memory_per_rank(load_config([*sharded, f"parallel.prefetch={n}"], 8), 8) for n in (0, 1, 3)]
    assert plans[0].gathered == plans[1].gathered < plans[2].gathered
