"""What a rank rehearses by itself is what it does among real peers: bytes held, collectives, blocks saved."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conf.errors import ConfigError, Violation
from data.loader import Batch
from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from parallel.rehearsal.collective_trace import CollectiveTrace
from parallel.rehearsal.coverage import CoverageCheck
from parallel.rehearsal.representatives import summed
from tests.parallel.layouts import EVEN
from tests.train.runs import TINY
from tests.worlds import run_world
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.estimate.rehearsal import (
    built_for,
    calls_of,
    coordinates_of,
    named_axes,
    play,
    play_some,
    sampled_ranks,
    step_of,
    step_shape_of,
    step_some,
    stepping_ranks,
    steps_of,
    summary,
)
from train.loop.run import build_state
from train.loop.state import TrainState
from train.loop.step import train_step

SIZE = 4
# Widths that ranks do not divide: shards are uneven, and padded.
SMALL_RUN = (*TINY, *EVEN, "model.width=24", "layout.pattern=gdn nsa kda hca mla", "model.depth=5")
LAYOUTS = {
    "dp2-tp2-ep4": ("parallel.tp=2", "parallel.ep=4"),
    "replicate2-cp2-ep2": (
        *("parallel.dp_replicate=2", "parallel.cp=2", "parallel.ep=2"),
        "train.micro_batch=1",
    ),
    "cp2-tp2": ("parallel.cp=2", "parallel.tp=2", "mixer.nsa.num_key_heads=1"),
}
# Layers of three kinds, one to four of each, and a MTP module. In the pipelines more
# micro-batches than are played.
MANY = (
    *("layout.pattern=gdn mla", "model.depth=8", "layout.ffn.first=dense"),
    *("model.mtp.depth=1", "model.mtp.mixer=mla"),
)
PIPELINES = {
    schedule: ("parallel.pp=2", f"parallel.pp_schedule={schedule}", "train.micro_batch=1", *keys)
    for schedule, keys in {
        "1f1b": ("parallel.tp=2",),
        "interleaved": ("parallel.cp=2",),
        "zero_bubble": ("parallel.ep=2", "train.global_batch=12"),
        "zero_bubble_v": ("parallel.dp_replicate=2", "train.global_batch=12"),
        "dualpipe_v": ("parallel.ep=2", "train.global_batch=12"),
    }.items()
}


RECOMPUTED = {
    "whole blocks recomputed": ("parallel.ep=2", "parallel.recompute=full"),
    "halves recomputed, the rest offloaded": (
        *("parallel.tp=2", "parallel.ep=2", "parallel.offload=activations"),
        "parallel.recompute=hca kda moe",
    ),
}
RUNS = {
    **LAYOUTS,
    **RECOMPUTED,
    **{f"many {layout}": (*MANY, *keys) for layout, keys in (LAYOUTS | PIPELINES).items()},
}


def mostly_long(names: Iterable[str], *, quick: tuple[str, ...]) -> list[Any]:
    """The names as parameters, all but a few of the long suite."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.prove) for name in names]


def config_of(*keys: str, size: int = SIZE) -> RunConfig:
    nowhere = ("data.directory=nowhere", "data.corpora.documents.source=nowhere")
    return load_config([*SMALL_RUN, *nowhere, *keys], size)


def on_rank(rank: int, size: int, config: RunConfig) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """A step among peers: bytes after the update and before gradients are dropped, and all collectives."""
    world = World(rank, size, torch.device("cpu"), open_axes(config.parallel.degrees(size), rank))
    state = build_state(config, world)
    held: dict[str, int] = {}
    state.optimizer.register_step_post_hook(lambda *_: held.update(measured(state)))
    rows, _ = config.rank_rows(world.axes.batch.size)
    shape = (rows, config.data.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape)
    numbers = torch.arange(shape[1]).expand(shape).contiguous()
    batch = Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), numbers, torch.arange(rows))
    with CollectiveTrace() as trace:
        # Before its first step a pipeline asks whether all stages know the shapes.
        for _ in range(1 if config.parallel.pp == 1 else 2):
            trace.taken()
            train_step(state, batch, config, world)
    calls = trace.taken()
    return held, summary({"update": Counter(calls)}, named_axes(calls, world.axes))


def measured(state: TrainState) -> dict[str, int]:
    parameters = [parameter for _, parameter in state.built.named_parameters()]
    moments = [x for p in parameters for x in state.optimizer.state[p].values()]
    grads = [p.grad for p in parameters if p.grad is not None]
    pieces = {}
    for x in (*parameters, *grads, *moments):
        storage = local(x).untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()
    return {
        "parameters": sum(local(p).numel() * p.element_size() for p in parameters),
        "gradients": sum(local(g).numel() * g.element_size() for g in grads),
        "optimizer": sum(local(x).numel() * x.element_size() for x in moments),
        "allocated": sum(pieces.values()),
    }


def local(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x.detach()


def by_axis(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Calls, bytes and bytes sent of a whole step; calls alone of what goes to chosen experts."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        sums = found.setdefault((row["axis"], row["kind"]), [0, 0, 0])
        is_chosen = row["kind"] == "all_to_all" and "ep" in row["axis"]
        for index, what in enumerate(("calls", "bytes", "sent")):
            sums[index] += 0 if is_chosen and index else row[what]
    return found


@pytest.mark.parametrize("run", mostly_long(RUNS, quick=("many zero_bubble_v",)))
def test_a_rehearsed_step_is_a_real_one(run: str) -> None:
    config = config_of(*RUNS[run])
    ranks = run_world(SIZE, on_rank, config, timeout=400.0)
    for rank in (0, SIZE - 1):
        held, collectives = ranks[rank]
        rehearsed = step_of(config, rank, SIZE)
        assert rehearsed["bytes"]["total"] == held
        assert by_axis(rehearsed["collectives"]) == by_axis(collectives)
        before = play(config, rank, SIZE)["bytes"]["total"]
        assert before == {what: held[what] for what in ("parameters", "gradients", "optimizer")}


@pytest.mark.parametrize("layout", mostly_long([*LAYOUTS, *PIPELINES], quick=()))
def test_few_layers_and_micro_batches_stand_for_all(layout: str) -> None:
    config = config_of(*MANY, *(LAYOUTS | PIPELINES)[layout])
    for rank in (0, SIZE - 1):
        whole = range(config.model.depth)
        found, work = steps_of(config, rank, SIZE), step_shape_of(config, SIZE)
        assert len(found) > 1
        full = step_some(config, rank, SIZE, whole, work.micro_batches)
        assert calls_of(found) == {phase: Counter(calls) for phase, calls in full.calls.items()}
        assert summed([(weight, step.bytes) for weight, step in found]) == full.bytes
        held = play_some(config, rank, SIZE, whole)
        few = play(config, rank, SIZE)
        assert few["bytes"] == held["bytes"]
        assert {key: few["checkpoint"][key] for key in held["counts"]} == held["counts"]


# Four pipeline ranks of two ranks each; stages are alike but for the ends.
STAGES = {
    schedule: (
        *("layout.pattern=gdn", f"model.depth={depth}", "parallel.pp=4", f"parallel.pp_schedule={schedule}"),
        *("parallel.ep=2", "train.micro_batch=1", "train.global_batch=24"),
        "parallel.reshard_after_forward=false",
    )
    for schedule, depth in {
        "1f1b": 4,
        "interleaved": 8,
        "zero_bubble": 4,
        "zero_bubble_v": 8,
        "dualpipe_v": 8,
    }.items()
}


def entries(step: dict[str, Any], config: RunConfig, rank: int) -> str:
    """The step as that of another rank, with the order of its entries."""
    return json.dumps(step | coordinates_of(config, rank, 8))


# No rank of DualPipe-V represents another: each splits another number of backwards.
@pytest.mark.parametrize("schedule", mostly_long([*STAGES][:-1], quick=("1f1b",)))
def test_a_stage_stands_for_those_like_it(schedule: str) -> None:
    config = config_of(*STAGES[schedule], size=8)
    assert stepping_ranks(config, 8) == {0: 0, 2: 2, 4: 2, 6: 6}
    steps = {rank: step_of(config, rank, 8) for rank in (0, 2, 4, 6)}
    assert entries(steps[2], config, 4) == entries(steps[4], config, 4)
    for end in (0, 6):
        assert entries(steps[2], config, end) != entries(steps[end], config, end)


def test_a_stage_that_differs_stands_for_itself() -> None:
    def found(*keys: str) -> list[int]:
        return list(stepping_ranks(config_of(*keys, size=8), 8).values())

    each = [0, 2, 4, 6]
    assert found(*STAGES["dualpipe_v"]) == each
    # Gathered again after forward, other layers, a layer that is frozen.
    assert found(*STAGES["1f1b"], "parallel.reshard_after_forward=true") == each
    assert found(*STAGES["1f1b"], "layout.pattern=gdn gdn mla") == each
    assert found(*STAGES["1f1b"], "optim.lr_scales={layers.2.*: 0.0}") == each
    # In a V the last rank holds both sides of its fold.
    assert found(*STAGES["zero_bubble_v"]) == [0, 2, 2, 6]


def test_an_error_of_another_process_keeps_its_keys() -> None:
    error = ConfigError([Violation("parallel.tp", "found 3"), Violation("parallel.ep", "found 7")])
    assert pickle.loads(pickle.dumps(error)).violations == error.violations


def test_another_size_of_shards_is_seen() -> None:
    few = ("layout.pattern=gdn mla", "model.depth=2", "parallel.tp=2")
    config, other = config_of(*few), config_of(*few, "parallel.dp_replicate=2")
    (held, collectives), *_ = run_world(SIZE, on_rank, config, timeout=400.0)
    rehearsed = step_of(other, 0, SIZE)
    assert rehearsed["bytes"]["total"] != held
    assert by_axis(rehearsed["collectives"]) != by_axis(collectives)


@pytest.mark.parametrize("layout", mostly_long(LAYOUTS, quick=("dp2-tp2-ep4",)))
def test_blocks_of_all_ranks_make_up_every_parameter(layout: str) -> None:
    config = config_of(*LAYOUTS[layout])
    played = [play(config, rank, SIZE)["checkpoint"] for rank in range(SIZE)]
    assert [line for rank in played for line in rank["problems"]] == []
    # Counted over the ranks themselves: what they hold, each block once, is the whole.
    with built_for(config, 0, SIZE) as (built, _):
        shapes = {name: shard_map.shape for name, shard_map in built.shard_maps.items()}
    for name, shape in shapes.items():
        blocks = {block for rank in played for block in rank["blocks"][name]}
        held = torch.zeros(shape, dtype=torch.int32)
        for corner, sizes in blocks:
            held[tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))] += 1
        assert bool((held == 1).all()), name


def test_a_wrong_block_is_seen() -> None:
    config = config_of("parallel.tp=2", "parallel.ep=4")
    with built_for(config, 0, SIZE) as (built, world):
        coverage = CoverageCheck(config.architecture, built, world.axes)
        name = "head.weight"
        (corner, sizes), *_ = sorted(coverage.blocks(name))
        assert coverage.violations({name: [(corner, sizes)]}) == []
        assert coverage.violations({name: [(corner, (sizes[0] - 1, *sizes[1:]))]}) != []
        # One rank's cut taken for a cut over fewer ranks, and another part of the vocabulary for its own.
        coverage._cuts[name] = (0, 3)
        assert coverage.violations({name: [(corner, sizes)]}) != []
        coverage._cuts[name] = (0, 2)
        coverage._dense[1] = coverage._dense[0]
        assert any("held by no rank" in line for line in coverage.violations({}))


def test_the_sample_has_the_ends_of_every_axis() -> None:
    assert sampled_ranks(Degrees()) == [0]
    assert sampled_ranks(Degrees(dp_shard=4, tp=2)) == [0, 1, 6, 7]
    assert sampled_ranks(Degrees(pp=2, dp_shard=2)) == [0, 1, 2, 3]


def test_an_impossible_layout_is_refused_with_all_that_is_wrong() -> None:
    keys = ("parallel.tp=3", "parallel.ep=7", "data.sequence_length=100", "data.tokenizer.vocab_size=99999")
    command = [sys.executable, "-m", "train.rehearse", "cluster=h100_8n", *keys]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 64
    for key in ("parallel.tp", "data.sequence_length", "model.vocab_size"):
        assert f"error: {key}: " in done.stderr


def test_json_of_a_rank_is_one_object() -> None:
    keys = ("model=kimi_linear_small", "cluster=h100_1n", "train.global_batch=8", "parallel.ep=4")
    more = ("rehearse.rank=5", "rehearse.format=json", "model.depth=2")
    command = [sys.executable, "-m", "train.rehearse", *keys, *more]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    figures = json.loads(printed)
    assert [rank["rank"] for rank in figures["ranks"]] == [5]
    assert figures["checkpoint"]["problems"] == []
    assert {row["phase"] for row in figures["steps"][0]["collectives"]} == {"forward", "backward", "update"}
