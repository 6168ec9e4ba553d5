"""A pipeline's losses and gradients are those of one process, under every schedule."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import IGNORED
from model.config import Architecture
from model.language_model import LanguageModel, Losses
from model.mixer import Sequence
from parallel.axes import Degrees, open_axes
from parallel.pipeline import (
    Denominators,
    MicroBatch,
    Pipeline,
    added,
    build_stages,
    objective_of,
)
from parallel.schedules import Plan
from tests.architectures import random_model, small_architecture
from tests.worlds import run_world

TOKENS = 14
LIMIT = 1e-12

EXPERTS = ("moe.balance_loss=0.3", "moe.z_loss=0.2", "model.z_loss=0.1")
MODELS = {
    "hybrid": (
        *EXPERTS,
        "layout.pattern=2*gdn attn",
        "layout.ffn.first=dense",
        "model.has_tied_embeddings=true",
    ),
    "streams": (*EXPERTS, "layout.pattern=csa hca", "residual=hyper", "layout.ffn.first=2*hash"),
    "shared": (*EXPERTS, "layout=dsa_shared_1to3", "model.prediction.depth=2", "model.prediction.mixer=dsa"),
    "shortcut": (*EXPERTS, "layout.pattern=lightning", "layout.ffn.pattern=shortcut dense"),
}
# Layers of the first stages; the last has the rest. Unequal, and never between layers that belong together.
CUTS = {
    "hybrid": {2: (1,), 4: (3, 4, 6), 8: (1, 2, 3, 4, 5, 6, 7)},
    "streams": {2: (3,), 4: (1, 4, 5), 8: (1, 2, 3, 4, 5, 6, 7)},
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
        place = torch.arange(TOKENS).expand(2, -1)
        position = place - torch.where(starts > 0, place, 0).cummax(1).values
        targets[:, -1] = IGNORED
        targets[0, : index + 1] = IGNORED
        batches.append(MicroBatch(targets, Sequence(position, document, tokens)))
    return batches


def denominators_of(batches: list[MicroBatch]) -> Denominators:
    targets = torch.stack([(batch.targets != IGNORED).sum() for batch in batches]).sum()
    return Denominators(targets, sum(batch.targets.numel() for batch in batches))


def seeded(config: Architecture) -> LanguageModel:
    torch.manual_seed(3)
    return random_model(config, torch.float64)


def alone(config: Architecture, count: int) -> tuple[Losses, dict[str, Tensor]]:
    model, batches = seeded(config), batches_of(config, count)
    total = None
    for batch in batches:
        losses = model.loss(batch.sequence.tokens, batch.targets, batch.sequence)
        objective_of(losses, denominators_of(batches)).backward()
        total = added(total, losses)
    assert total is not None
    return total, {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


def pipelined(rank: int, size: int, name: str, runs: list[tuple[Plan, tuple[int, ...]]]) -> list[Any]:
    config, axis = architecture(name), open_axes(Degrees(pp=size), rank).pp
    state = seeded(config).state_dict()
    found = []
    for plan, cuts in runs:
        stages = build_stages(config, torch.float64, plan, rank, layers_of(cuts, config.model.depth))
        for stage in stages:
            stage.to(torch.float64)
            stage.load_state_dict({key: state[key].clone() for key in stage.state_dict()})
        pipeline = Pipeline(stages, axis, plan, (2, TOKENS), torch.device("cpu"))
        batches = batches_of(config, plan.micro_batches)
        losses = pipeline.step(batches, denominators_of(batches))
        copied = {id(parameter) for parameter in pipeline.copies}
        grads = [
            (name, parameter.grad, id(parameter) in copied)
            for stage in stages
            for name, parameter in stage.named_parameters()
        ]
        found.append((losses, grads))
    return found


def distance(found: Tensor, expected: Tensor, floor: float) -> float:
    return float((found - expected).abs().max() / max(float(expected.abs().max()), floor))


def assert_equal_to_alone(name: str, runs: list[tuple[Plan, tuple[int, ...]]], limit: float = LIMIT) -> None:
    config = architecture(name)
    worlds = run_world(runs[0][0].degree, pipelined, name, runs)
    for index, (plan, _) in enumerate(runs):
        losses, grads = alone(config, plan.micro_batches)
        ranks = [world[index] for world in worlds]
        for place, expected in enumerate(sorted_parts(losses)):
            total = torch.stack([sorted_parts(part)[place] for part, _ in ranks]).sum(0)
            assert distance(total, expected, 1e-9) < limit, (plan, place)
        # Gradients of parameters that softmax cancels are rounding only.
        floor = 1e-6 * max(float(grad.abs().max()) for grad in grads.values())
        counted = [key for _, part in ranks for key, _, is_copy in part if not is_copy]
        assert sorted(counted) == sorted(key for key, _ in seeded(config).named_parameters())
        for _, part in ranks:
            for key, grad, _ in part:
                assert (grad is None) == (key not in grads), (plan, key)
                if grad is not None:
                    assert distance(grad, grads[key], floor) < limit, (plan, key)


def sorted_parts(losses: Losses) -> list[Tensor]:
    return losses._replace(auxiliary=dict(sorted(losses.auxiliary.items()))).parts()


def plans(degree: int, micro_batches: int) -> list[Plan]:
    return [
        Plan("1f1b", degree, 1, micro_batches),
        Plan("interleaved", degree, 2, micro_batches),
        Plan("zero_bubble", degree, 2, micro_batches),
        Plan("zero_bubble_v", degree, 2, micro_batches),
        Plan("dualpipe_v", degree, 2, micro_batches),
    ]


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize(("degree", "micro_batches"), [(2, 4), (4, 8)])
def test_every_schedule_equals_one_process(name: str, degree: int, micro_batches: int) -> None:
    runs = [(plan, CUTS[name][plan.stages]) for plan in plans(degree, micro_batches)]
    assert_equal_to_alone(name, runs)
