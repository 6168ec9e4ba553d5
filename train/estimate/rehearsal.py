"""One rank of a run without its peers: what it holds, what it saves, and what it says in a step."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan

from data.loader import Batch
from model.moe.layer import Experts
from parallel.apply import Parallel, StepShape, build_on_meta
from parallel.config.degrees import ORDER, Degrees, coordinates
from parallel.mesh.axes import Axes
from parallel.mesh.world import World
from parallel.micro_batches import MicroBatch
from parallel.pipeline.partition import stage_layers, write_layout
from parallel.rehearsal.collective_trace import Collective, CollectiveTrace
from parallel.rehearsal.coverage import Block, CoverageCheck
from parallel.rehearsal.fake_world import Link, materialise_shapes, stand_in
from parallel.rehearsal.representatives import (
    Sample,
    Weight,
    equivalent_ranks,
    micro_batches,
    samples,
    summed,
    summed_calls,
)
from parallel.shard.expert import AllToAll
from train.checkpoint.storage import flatten
from train.config.run_config import RunConfig
from train.estimate.local_state import local_bytes
from train.loop.state import TrainState
from train.loop.step import split_batch, summed_over_ranks
from train.optim.param_groups import build_optimizer


def sampled_ranks(degrees: Degrees) -> list[int]:
    """The first rank and the last, and for each axis one that is the first on all others and the last on it.

    Parts shrink along an axis where they differ, so the fullest and the emptiest are among them.
    """
    ranks, stride = {0, degrees.size - 1}, 1
    for name in reversed(ORDER):
        degree = getattr(degrees, name)
        ranks.add((degree - 1) * stride)
        if name == "pp":
            ranks.update(range(0, degrees.size, stride))
        stride *= degree
    return sorted(ranks)


def stepping_ranks(config: RunConfig, size: int) -> dict[int, int]:
    """The first rank of each pp_rank, and which of them says in a step what it says."""
    parallel, stride = config.parallel, size // config.parallel.pp
    plan = parallel.plan(step_shape_of(config, size).micro_batches)
    # A pattern may freeze a single layer.
    if plan is None or config.optim.lr_scales:
        return {rank: rank for rank in range(0, size, stride)}
    cut = stage_layers(config.architecture, plan, config.data.sequence_length, parallel.pp_layout)
    gathers_again = parallel.reshard_after_forward
    like = equivalent_ranks(config.architecture, plan, cut, gathers_again=gathers_again)
    return {pp_rank * stride: other * stride for pp_rank, other in enumerate(like)}


def with_pp_layout(config: RunConfig, size: int) -> RunConfig:
    """The config with the cut of its pipeline written down: to find it takes as long as to build a rank."""
    plan = config.parallel.plan(step_shape_of(config, size).micro_batches)
    if plan is None:
        return config
    cut = stage_layers(config.architecture, plan, config.data.sequence_length, config.parallel.pp_layout)
    layout = write_layout(config.architecture, cut)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"pp_layout": layout})})


def play(config: RunConfig, rank: int, size: int) -> dict[str, Any]:
    """What a rank holds, and the check of what it saves."""
    sample = samples_of(config, rank, size)
    found = [play_some(config, rank, size, some.layers) for some in sample]
    weights = [some.weight for some in sample]

    def total(what: str) -> Any:
        return summed([(weight, each[what]) for weight, each in zip(weights, found, strict=True)])

    return {
        **coordinates_of(config, rank, size),
        "bytes": total("bytes"),
        "checkpoint": total("counts")
        | {
            "blocks": {name: blocks for each in found for name, blocks in each["blocks"].items()},
            "problems": list(dict.fromkeys(line for each in found for line in each["problems"])),
        },
    }


def samples_of(config: RunConfig, rank: int, size: int) -> list[Sample]:
    """What of a rank's layers to play; all where single layers may be frozen."""
    architecture, parallel = config.architecture, config.parallel
    plan = parallel.plan(step_shape_of(config, size).micro_batches)
    stages = [range(architecture.model.depth)]
    if plan is not None:
        pp_rank = coordinates(parallel.degrees(size), rank)["pp"]
        cut = stage_layers(architecture, plan, config.data.sequence_length, parallel.pp_layout)
        stages = [cut[stage] for stage in plan.stages_of(pp_rank)]
    if config.optim.lr_scales:
        return [Sample(tuple(sorted(layer for stage in stages for layer in stage)), 1)]
    return samples(architecture, stages)


def step_shape_of(config: RunConfig, size: int) -> StepShape:
    """What a rank does in a step."""
    degrees = config.parallel.degrees(size)
    rows, micro = config.rank_rows(degrees.dp_replicate * degrees.dp_shard)
    return StepShape(rows // micro, micro, config.data.sequence_length)


def play_some(config: RunConfig, rank: int, size: int, layers: Collection[int]) -> dict[str, Any]:
    """What a rank with some of its layers holds, and what it saves."""
    with built_for(config, rank, size, layers) as (built, world):
        state = TrainState(built, build_optimizer(built, config.optim), config.optim)
        held = local_bytes(built, state.optimizer, config.optim)
        del held["total"]["allocated"]
        return {"bytes": held, **save_plan(config, state, world)}


@contextmanager
def built_for(
    config: RunConfig,
    rank: int,
    size: int,
    layers: Collection[int] | None = None,
    micro_batches: int | None = None,
) -> Iterator[tuple[Parallel, World]]:
    """The part of a rank on the meta device, as a run of `size` processes builds it.

    layers are those that it has, micro_batches how many it runs: those of the config by default.
    """
    dtypes = (getattr(torch, config.precision.parameters), getattr(torch, config.precision.compute))
    architecture, step_shape = config.architecture, step_shape_of(config, size)
    # What is compiled holds no collectives, and shapes alone are not worth a compiler.
    parallel = config.parallel.model_copy(update={"compile": False})
    plan = parallel.plan(step_shape.micro_batches)
    if micro_batches is not None and plan is not None:
        # The cut may depend on how many there are.
        cut = stage_layers(architecture, plan, step_shape.tokens, parallel.pp_layout)
        parallel = parallel.model_copy(update={"pp_layout": write_layout(architecture, cut)})
        step_shape = step_shape._replace(micro_batches=micro_batches)
    with stand_in(parallel, rank, size) as world:
        yield build_on_meta(architecture, dtypes, parallel, world, step_shape, layers, Link)[0], world


def cut_coordinates(degrees: Degrees, rank: int) -> dict[str, int]:
    """Where a rank stands on the axes that are cut."""
    found = coordinates(degrees, rank)
    return {name: found[name] for name in ORDER if getattr(degrees, name) > 1}


def save_plan(config: RunConfig, state: TrainState, world: World) -> dict[str, Any]:
    """The blocks that a checkpoint takes from this rank, and what is wrong with those of all ranks together.

    Makes the optimizer's moments.
    """
    flat, _ = flatten(state.tensors(world))
    plan = create_default_local_save_plan(flat, is_coordinator=world.rank == 0)
    names = list(dict.fromkeys(name for name, _ in state.built.named_parameters()))
    held: dict[str, list[Block]] = {name: [] for name in names}
    saved, problems = 0, []
    for item in plan.items:
        data = item.tensor_data
        if data is None:
            continue
        saved += data.chunk.sizes.numel() * data.properties.dtype.itemsize
        name = item.index.fqn.removeprefix("model.")
        if name in held:
            held[name].append((tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
            if data.size != state.built.shard_maps[name].shape:
                problems.append(f"{name}: saved as {tuple(data.size)}")
    coverage = CoverageCheck(config.architecture, state.built, world.axes)
    problems += coverage.violations(held)
    numbers = sum(shard_map.shape.numel() for shard_map in state.built.shard_maps.values())
    # Weights and slots of the optimizer in one dtype, and perhaps a step count for each parameter.
    trained = sum(len(group["params"]) for group in state.optimizer.param_groups)
    width = getattr(torch, config.precision.parameters).itemsize
    counts = {
        "parameters": len(names),
        "items": len(plan.items),
        "bytes": saved,
        "whole_bytes": (1 + len(config.optim.slots)) * width * numbers
        + 4 * trained * config.optim.counts_steps,
    }
    return {"counts": counts, "blocks": {name: held[name] for name in names}, "problems": problems}


def step_of(config: RunConfig, rank: int, size: int) -> dict[str, Any]:
    """The collectives of one optimizer step of a rank, recorded as they are called, and what it allocates."""
    return joined_step(config, rank, size, steps_of(config, rank, size))


def coordinates_of(config: RunConfig, rank: int, size: int) -> dict[str, Any]:
    """A rank, and where it stands on the axes that are cut."""
    return {"rank": rank, "coordinates": cut_coordinates(config.parallel.degrees(size), rank)}


def joined_step(
    config: RunConfig, rank: int, size: int, found: Sequence[tuple[Weight, "RecordedStep"]]
) -> dict[str, Any]:
    """The step of a rank from those of its parts."""
    step_shape, degrees = step_shape_of(config, size), config.parallel.degrees(size)
    names = {ranks: name for _, step in found for ranks, name in step.axes.items()}
    return {
        **coordinates_of(config, rank, size),
        "micro_batches": step_shape.micro_batches,
        "tokens": step_shape.rows * step_shape.tokens // (degrees.cp * degrees.tp),
        "is_routed_evenly": any(step.is_routed_evenly for _, step in found),
        "collectives": summary(calls_of(found), names),
        "bytes": summed([(weight, step.bytes) for weight, step in found]),
    }


class StepPart(NamedTuple):
    """What to play of a step: some layers, so many micro-batches; and how often what is found counts."""

    layers: tuple[int, ...]
    micro_batches: int
    weight: Weight


def step_parts(config: RunConfig, rank: int, size: int) -> list[StepPart]:
    """Steps with some layers, a pipeline's with few micro-batches, whose weighted sum is that of all."""
    step_shape = step_shape_of(config, size)
    plan = config.parallel.plan(step_shape.micro_batches)
    counts = [(step_shape.micro_batches, 1)] if plan is None else micro_batches(plan)
    return [
        StepPart(some.layers, count, some.weight * weight)
        for some in samples_of(config, rank, size)
        for count, weight in counts
    ]


def steps_of(config: RunConfig, rank: int, size: int) -> list[tuple[Weight, "RecordedStep"]]:
    """The parts of a rank's step, played, and their weights."""
    return [
        (part.weight, step_some(config, rank, size, part.layers, part.micro_batches))
        for part in step_parts(config, rank, size)
    ]


def calls_of(found: Sequence[tuple[Weight, "RecordedStep"]]) -> dict[str, Counter[Collective]]:
    """The weighted sum of the collectives, by phase."""
    return {
        phase: summed_calls([(weight, step.calls[phase]) for weight, step in found])
        for phase in found[0][1].calls
    }


class RecordedStep(NamedTuple):
    """What was recorded of a step: collectives by phase, and bytes held after the update.

    axes name the ranks between which they ran.
    """

    calls: dict[str, list[Collective]]
    bytes: dict[str, dict[str, int]]
    axes: dict[tuple[int, ...], str]
    is_routed_evenly: bool


def step_some(
    config: RunConfig, rank: int, size: int, layers: Collection[int], micro_batches: int
) -> RecordedStep:
    """The step of a rank with some of its layers and so many micro-batches."""
    built_so = built_for(config, rank, size, layers, micro_batches)
    with built_so as (built, world), FakeTensorMode():
        materialise_shapes(built)
        state = TrainState(built, build_optimizer(built, config.optim), config.optim)
        calls = run_step(state, config, world, micro_batches)
        is_routed_evenly = any(
            isinstance(module, Experts) and isinstance(module.dispatch, AllToAll)
            for module in built.modules()
        )
        axes = named_axes(chain.from_iterable(calls.values()), world.axes)
        return RecordedStep(calls, local_bytes(built, state.optimizer, config.optim), axes, is_routed_evenly)


def run_step(
    state: TrainState, config: RunConfig, world: World, micro_batches: int
) -> dict[str, list[Collective]]:
    """The collectives of a step by phase: those of the parts of `train_step`, which run here.

    Mutates the state. Without a pipeline micro-batches but the last are alike, and where weights have no
    copies so is the last: one of them is run and counted as often.
    """
    is_pipeline = state.built.whole is None
    has_last = micro_batches > 1 and world.axes.dp_replicate.size > 1
    played = micro_batches if is_pipeline else 1 + has_last
    with CollectiveTrace() as trace:
        batches, denominators = split_batch(zeros(config, world, played), config, world, state.step)
        before = trace.taken()
        if is_pipeline:
            losses = state.built.runner.step(batches, denominators)
            found = {"pipeline": trace.taken()}
        else:
            each = Observed(batches, trace)
            losses = state.built.runner.step(each, denominators)
            found = each.phases([micro_batches - has_last, 1][:played])
        total = summed_over_ranks(losses, world)
        state.apply(state.reduce_gradients(world), config.optim.lr, config.optim.clip_norm)
        state.built.update_expert_biases(total.load)
        return found | {"update": before + trace.taken()}


class Observed(list[MicroBatch]):
    """Micro-batches that tell what is called while each runs."""

    def __init__(self, batches: Iterable[MicroBatch], trace: CollectiveTrace) -> None:
        super().__init__(batches)
        self._trace = trace
        self._calls: list[dict[str, list[Collective]]] = []

    def __iter__(self) -> Iterator[MicroBatch]:
        """Each in turn."""
        for batch in super().__iter__():
            yield batch
            self._calls.append(self._trace.taken_by_phase())

    def phases(self, times: Sequence[int]) -> dict[str, list[Collective]]:
        """All calls by phase, where each micro-batch counts so many times."""
        return {
            phase: [
                call for calls, count in zip(self._calls, times, strict=True) for call in calls[phase] * count
            ]
            for phase in ("forward", "backward")
        }


def zeros(config: RunConfig, world: World, micro_batches: int) -> Batch:
    """Rows of this rank for so many micro-batches."""
    _, micro = config.rank_rows(world.axes.batch.size)
    numbers = torch.zeros(micro_batches * micro, config.data.sequence_length, dtype=torch.long)
    return Batch(*[numbers] * len(Batch._fields))


def summary(
    phases: Mapping[str, Counter[Collective]], axes: Mapping[tuple[int, ...], str]
) -> list[dict[str, Any]]:
    """Calls, bytes and bytes sent by phase, axis and kind of collective; axes name the ranks."""
    rows: dict[tuple[str, str, int, str], dict[str, int]] = {}
    for phase, calls in phases.items():
        for call, count in calls.items():
            key = (phase, axes[call.ranks], len(call.ranks), call.kind)
            row = rows.setdefault(key, {"calls": 0, "bytes": 0, "sent": 0})
            row["calls"] += count
            row["bytes"] += count * call.bytes
            row["sent"] += count * call.sent
    names = ("phase", "axis", "ranks", "kind")
    return [dict(zip(names, key, strict=True)) | row for key, row in rows.items()]


def named_axes(calls: Iterable[Collective], axes: Axes) -> dict[tuple[int, ...], str]:
    """The axis of each group of ranks that collectives run between."""
    return {ranks: axis_of(ranks, axes) for ranks in {call.ranks for call in calls}}


def axis_of(ranks: tuple[int, ...], axes: Axes) -> str:
    """The axes that run along some ranks, such as `tp`, `dp_shard x cp`, `ep` or `edp`."""
    degrees = axes.degrees
    spots = [coordinates(degrees, rank) for rank in ranks]
    varying = [name for name in ORDER if len({spot[name] for spot in spots}) > 1]
    size = 1
    for name in varying:
        size *= getattr(degrees, name)
    found = [" x ".join(varying)] if size == len(ranks) and varying else []
    found += ["ep"] * (ranks == axes.ep.ranks)
    if not found and ranks == axes.edp.ranks:
        found.append("edp")
    return " or ".join(found) or "one rank"
