"""A pipeline's losses and gradients are those of one process, under every schedule."""

from functools import cache
from itertools import pairwise
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining._backward import (
    stage_backward,
    stage_backward_input,
    stage_backward_weight,
)

import parallel.pipeline.runner
from conf.compose import group_options
from conf.errors import ConfigError
from kernels.cross_entropy import IGNORED
from model.config import Architecture
from model.initial import initial_values
from model.language_model import LanguageModel, Losses, ModelPart
from model.mixer import Sequence as Tokens
from model.mixers.lightning import Lightning
from parallel.config.degrees import Degrees
from parallel.config.pipeline import PipelinePlan, ScheduleName, plan_violations
from parallel.mesh.axes import open_axes
from parallel.micro_batches import Denominators, MicroBatch, added, objective_of
from parallel.pipeline.partition import joined_layers
from parallel.pipeline.runner import Pipeline, Stage, build_stages
from parallel.pipeline.schedules import Action, action_order
from parallel.shard.fsdp import apply_fsdp
from tests.architectures import random_model, randomise, small_architecture
from tests.parallel.layouts import targets_of
from tests.worlds import run_world

TOKENS = 14
SHARDED = ("1f1b", "zero_bubble_v")
LIMIT = 1e-12

EXPERTS = ("moe.balance_loss=0.3", "moe.z_loss=0.2", "model.z_loss=0.1")
MTP = ("model.mtp.depth=2", "model.mtp.coefficient=0.7")
MODELS = {
    "hybrid": (
        *EXPERTS,
        "layout.pattern=2*gdn attn",
        "layout.ffn.first=dense",
        "model.has_tied_embeddings=true",
    ),
    "streams": (
        *(*EXPERTS, *MTP, "model.mtp.mixer=csa"),
        *("layout.pattern=csa hca", "residual=hyper", "layout.ffn.first=2*hash"),
    ),
    "shared": (*EXPERTS, "layout.pattern=dsa dsa_shared", "residual=scaled_post_norm"),
    "shortcut": (*EXPERTS, *MTP, "layout.pattern=lightning kda", "layout.ffn.pattern=shortcut dense"),
    "dense": ("layout.pattern=mamba2 swa", "layout.ffn.pattern=dense", "model.embedding_scale=3.0"),
}
# Where the later stages begin. Unequal, and never between layers that belong together.
CUTS = {
    "hybrid": {2: (3,), 4: (1, 4, 6), 8: (1, 2, 3, 4, 5, 6, 7)},
    "streams": {2: (3,), 4: (1, 4, 5), 8: (1, 2, 3, 4, 5, 6, 7)},
    "shared": {2: (2,), 4: (2, 4, 6)},
    "shortcut": {2: (6,), 4: (2, 4, 6)},
    "dense": {2: (5,), 4: (1, 2, 7)},
}


def architecture(name: str) -> Architecture:
    return small_architecture([*MODELS[name], "model.depth=8"])


def layers_of(cuts: tuple[int, ...], depth: int) -> list[range]:
    edges = (0, *cuts, depth)
    return [range(*pair) for pair in pairwise(edges)]


def batches_of(config: Architecture, count: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for index in range(count):
        tokens = torch.randint(config.model.vocab_size, (2, TOKENS), generator=generator)
        targets = tokens.roll(-1, 1)
        # Other documents in each row and micro-batch, and unequal counts of targets.
        starts = torch.zeros(2, TOKENS, dtype=torch.long)
        starts[0, 3 + index], starts[1, 5], starts[1, 6] = 1, 1, 1
        document = starts.cumsum(1)
        micro_batch_index = torch.arange(TOKENS).expand(2, -1)
        position = micro_batch_index - torch.where(starts > 0, micro_batch_index, 0).cummax(1).values
        targets[:, -1] = IGNORED
        targets[0, : index + 1] = IGNORED
        batches.append(MicroBatch(targets, Tokens(position, document, tokens)))
    return batches


def denominators_of(batches: list[MicroBatch], config: Architecture) -> Denominators:
    mtp = config.model.mtp
    targets = [
        sum(targets_of(batch.targets, cast(Tensor, batch.sequence.document), ahead) for batch in batches)
        for ahead in range(1 + mtp.depth)
    ]
    tokens = sum(batch.targets.numel() for batch in batches)
    return Denominators(torch.tensor(targets), tokens, mtp.coefficient)


def seeded(config: Architecture) -> LanguageModel:
    torch.manual_seed(3)
    return random_model(config, torch.float64)


@cache
def alone(name: str, count: int) -> tuple[Losses, dict[str, Tensor]]:
    model, batches = seeded(architecture(name)), batches_of(architecture(name), count)
    total = None
    for batch in batches:
        losses = model.loss(batch.sequence.tokens, batch.targets, batch.sequence)
        objective_of(losses, denominators_of(batches, architecture(name))).backward()
        total = added(total, losses)
    assert total is not None
    return total, {key: part.grad for key, part in model.named_parameters() if part.grad is not None}


class Run(NamedTuple):
    """A plan, where its later stages begin, and what to break."""

    plan: PipelinePlan
    cuts: tuple[int, ...]
    broken: str = ""


class Found(NamedTuple):
    """What a rank has after two steps: losses of the second, gradients by name and whether it is a copy, and
    what it computed in the second.
    """

    losses: Losses
    grads: list[tuple[str, Tensor | None, bool]]
    order: list[Action]


class Untied:
    @staticmethod
    def apply(stream: Tensor, objective: Tensor) -> Tensor:
        return stream.clone()


def break_in(stages: list[Stage], pipeline: Pipeline, broken: str) -> None:
    if broken == "own losses":
        parallel.pipeline.runner._Tie = Untied
    if broken == "sum of copies":
        pipeline._sum_copies = lambda: None
    if broken == "layer index":
        for stage in stages:
            for mixer in (block.mixer for block in stage.blocks if isinstance(block.mixer, Lightning)):
                mixer.layer -= stage.layers.start


def record(pipeline: Pipeline) -> list[Action]:
    # What the stages are really told to do, in order.
    order: list[Action] = []
    schedule = pipeline._schedule
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:

        def forward(
            micro_batch_index, *args, run=stage.forward_one_chunk, index=stage.stage_index, **options
        ):
            order.append(Action(index, "forward", micro_batch_index))
            return run(micro_batch_index, *args, **options)

        def backward(micro_batch_index, run=stage.backward_one_chunk, index=stage.stage_index, **options):
            kind = "backward" if options.get("full_backward", True) else "input"
            order.append(Action(index, kind, micro_batch_index))
            return run(micro_batch_index, **options)

        def weight(
            micro_batch_index, run=stage.backward_weight_one_chunk, index=stage.stage_index, **options
        ):
            order.append(Action(index, "weight", micro_batch_index))
            return run(micro_batch_index, **options)

        stage.forward_one_chunk, stage.backward_one_chunk = forward, backward
        stage.backward_weight_one_chunk = weight
    return order


def pipelined(rank: int, size: int, name: str, runs: list[Run]) -> list[Found]:
    config, axis = architecture(name), open_axes(Degrees(pp=size), rank).pp
    state = seeded(config).state_dict()
    found = []
    for plan, cuts, broken in runs:
        stages = build_stages(config, torch.float64, plan, rank, layers_of(cuts, config.model.depth))
        for stage in stages:
            stage.to(torch.float64)
            stage.load_state_dict({key: state[key].clone() for key in stage.state_dict()})
        pipeline = Pipeline(stages, axis, plan, (2, TOKENS), torch.device("cpu"))
        break_in(stages, pipeline, broken)
        batches = batches_of(config, plan.micro_batches)
        pipeline.step(batches, denominators_of(batches, config))
        order = record(pipeline)
        for stage in stages:
            stage.zero_grad()
        losses = pipeline.step(batches, denominators_of(batches, config))
        grads = [
            (key, parameter.grad, is_copy(key, stage))
            for stage in stages
            for key, parameter in stage.named_parameters()
        ]
        found.append(Found(losses, grads, order))
    return found


def is_copy(key: str, stage: Stage) -> bool:
    """Whether an earlier stage has the parameter too."""
    return key == "embed.weight" and not stage.is_first


def distance(found: Tensor, expected: Tensor, floor: float) -> float:
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / max(float(expected.abs().max()), floor))


def assert_equal_to_alone(name: str, runs: list[Run]) -> None:
    worlds = run_world(runs[0].plan.degree, pipelined, name, runs, timeout=400)
    for index, (plan, _, _) in enumerate(runs):
        ranks = [world[index] for world in worlds]
        assert [found.order for found in ranks] == action_order(plan)
        counted = [key for found in ranks for key, _, is_copy in found.grads if not is_copy]
        assert sorted(counted) == sorted(key for key, _ in seeded(architecture(name)).named_parameters())
        assert_found(plan, ranks, alone(name, plan.micro_batches))


def assert_found(plan: PipelinePlan, ranks: list[Found], expected: tuple[Losses, dict[str, Tensor]]) -> None:
    losses, grads = expected
    for micro_batch_index, part in enumerate(sorted_parts(losses)):
        total = torch.stack([sorted_parts(found.losses)[micro_batch_index] for found in ranks]).sum(0)
        assert distance(total, part, 1e-9) < LIMIT, (plan, micro_batch_index)
    # Gradients of parameters that softmax cancels are rounding only.
    floor = 1e-6 * max(float(grad.abs().max()) for grad in grads.values())
    for found in ranks:
        for key, grad, _ in found.grads:
            assert (grad is None) == (key not in grads), (plan, key)
            if grad is not None:
                assert distance(grad, grads[key], floor) < LIMIT, (plan, key)


def sorted_parts(losses: Losses) -> list[Tensor]:
    return losses._replace(auxiliary=dict(sorted(losses.auxiliary.items()))).parts()


def plans(degree: int, micro_batches: int) -> list[PipelinePlan]:
    return [
        PipelinePlan("1f1b", degree, 1, micro_batches),
        PipelinePlan("interleaved", degree, 2, micro_batches),
        PipelinePlan("zero_bubble", degree, 1, micro_batches),
        PipelinePlan("zero_bubble", degree, 2, micro_batches),
        PipelinePlan("zero_bubble_v", degree, 2, micro_batches),
        PipelinePlan("dualpipe_v", degree, 2, micro_batches),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degree", "micro_batches"),
    [
        ("hybrid", 2, 4),
        *(
            pytest.param(*case, marks=pytest.mark.prove)
            for case in (
                ("streams", 2, 4),
                ("shared", 2, 4),
                ("shortcut", 2, 5),
                ("dense", 2, 4),
                ("hybrid", 4, 8),
                ("streams", 4, 8),
            )
        ),
    ],
)
def test_every_schedule_equals_one_process(name: str, degree: int, micro_batches: int) -> None:
    legal = [plan for plan in plans(degree, micro_batches) if not plan_violations(plan)]
    assert_equal_to_alone(name, [Run(plan, CUTS[name][plan.stages]) for plan in legal])


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        *(("hybrid", "own losses"), ("shared", "own losses"), ("hybrid", "sum of copies")),
        *(("shortcut", "sum of copies"), ("shortcut", "layer index")),
    ],
)
def test_each_safeguard_is_needed(name: str, broken: str, schedule: ScheduleName) -> None:
    plan = PipelinePlan(schedule, 2, 1, 2)
    with pytest.raises(AssertionError, match="assert"):
        assert_equal_to_alone(name, [Run(plan, CUTS[name][2], broken)])


@pytest.mark.parametrize("layout", group_options("layout"))
def test_every_mixer_lets_backward_be_split(layout: str) -> None:
    config = small_architecture([f"layout={layout}", "model.depth=8", *EXPERTS])
    free = [layer for layer in range(1, 8) if layer not in joined_layers(config)]
    torch.manual_seed(2)
    batch = batches_of(config, 1)[0]
    for start, stop in {(free[0], free[-1]), (free[-1], 8)}:
        if start == stop:
            continue
        stage = Stage(config, torch.float64, range(start, stop)).to(torch.float64)
        randomise(stage)
        found = []
        for is_split in (False, True):
            stage.zero_grad()
            stage.begin([batch], denominators_of([batch], config))
            generator = torch.Generator().manual_seed(1)
            shape = (2, TOKENS, config.model.width)
            stream = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
            out = stage(stream, micro_batch_index=torch.tensor([0]))
            grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64)] if out.ndim else None
            if is_split:
                into, groups = stage_backward_input([out], grads, [stream], stage.parameters())
                stage_backward_weight(stage.parameters(), groups)
            else:
                into = stage_backward((out,) if grads else out, grads, [stream])
            found.append([*into, *(parameter.grad for parameter in stage.parameters())])
        scale = max(float(part.abs().max()) for part in found[0] if part is not None)
        for whole, split in zip(*found, strict=True):
            assert (whole is None) == (split is None)
            assert whole is None or distance(split, whole, 1e-6 * scale) < LIMIT


def sharded(rank: int, size: int, name: str, runs: list[Run]) -> list[Found]:
    config, axes = architecture(name), open_axes(Degrees(pp=2, dp_shard=2), rank)
    state = seeded(config).state_dict()
    found = []
    for plan, cuts, _ in runs:
        stages = build_stages(config, torch.float64, plan, axes.pp.rank, layers_of(cuts, config.model.depth))
        for stage in stages:
            stage.to(torch.float64)
            stage.load_state_dict({key: state[key].clone() for key in stage.state_dict()})
            apply_fsdp(stage, axes, "cpu", reshard_after_forward=True)
        pipeline = Pipeline(stages, axes.pp, plan, (2, TOKENS), torch.device("cpu"))
        batches = batches_of(config, 2 * plan.micro_batches)
        losses = pipeline.step(batches[axes.dp_shard.rank :: 2], denominators_of(batches, config))
        grads = [
            (key, None if parameter.grad is None else parameter.grad.full_tensor(), is_copy(key, stage))
            for stage in stages
            for key, parameter in stage.named_parameters()
        ]
        found.append(Found(losses, grads, action_order(plan)[axes.pp.rank]))
    return found


@pytest.mark.slow
def test_stages_sharded_over_data_equal_one_process() -> None:
    runs = [Run(plan, CUTS["hybrid"][plan.stages]) for plan in plans(2, 2) if plan.schedule in SHARDED]
    worlds = run_world(4, sharded, "hybrid", runs, timeout=400)
    for index, (plan, _, _) in enumerate(runs):
        assert_found(plan, [world[index] for world in worlds], alone("hybrid", 2 * plan.micro_batches))


def refused(rank: int, size: int) -> None:
    config, axis = architecture("dense"), open_axes(Degrees(pp=size), rank).pp
    plan, cpu = PipelinePlan("1f1b", size, 1, 2), torch.device("cpu")
    stages = build_stages(config, torch.float64, plan, rank, layers_of((4,), 8))
    with pytest.raises(ConfigError, match="needs 2 micro-batches or more; found 1"):
        Pipeline(stages, axis, plan._replace(micro_batches=1), (2, TOKENS), cpu)
    pipeline = Pipeline(stages, axis, plan, (2, TOKENS), cpu)
    for count in (1, 3):
        batches = batches_of(config, count)
        with pytest.raises(ValueError, match=r"batches: found shapes .* the pipeline runs 2 of \(2, 14\)"):
            pipeline.step(batches, denominators_of(batches, config))


def test_other_micro_batches_than_planned_are_refused() -> None:
    assert run_world(2, refused) == [None, None]


def test_parts_have_the_names_and_first_values_of_the_whole() -> None:
    config = architecture("streams")
    whole = {key: part.shape for key, part in LanguageModel(config).named_parameters()}
    initials = initial_values(LanguageModel(config))
    seen: set[str] = set()
    for layers in layers_of((1, 4, 5), 8):
        part = ModelPart(config, layers=layers)
        shapes = {key: parameter.shape for key, parameter in part.named_parameters()}
        assert shapes.items() <= whole.items()
        assert initial_values(part).items() <= initials.items()
        # MTP modules read the embedding at the other end too.
        assert seen & shapes.keys() == ({"embed.weight"} if layers.stop == 8 else set())
        seen |= shapes.keys()
    assert seen == whole.keys()
