"""The update of a run against AdamW written by hand in float64: its schedule, groups, clipping and decay."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.loader import Batch
from model.language_model import LanguageModel
from model.mixer import Sequence as Rows
from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from tests.parallel.equality import Block, blocks_of, config_of, fill, laid_out
from tests.parallel.layouts import apart
from tests.worlds import run_world
from train.config.run_config import RunConfig
from train.loop.run import build_state, open_data
from train.loop.step import train_step

STEPS, WARMUP, FLOOR = 7, 2, 0.2
LR, BETA1, BETA2, EPS, DECAY, CLIP = 0.02, 0.8, 0.9, 1e-3, 0.3, 2.5
SCALES = {"*.mixer.*": 0.25, "*.out_norm.weight": 0.0}
DECAYED = ("*_proj.weight", "*.gate_up.weight", "*.down.weight", "head.weight")
KEYS = (
    *("layout.ffn.pattern=dense", f"optim.lr={LR}", f"optim.beta1={BETA1}", f"optim.beta2={BETA2}"),
    *(f"optim.eps={EPS}", f"optim.weight_decay={DECAY}", f"optim.clip_norm={CLIP}"),
    *(f"optim.lr_scales={SCALES}".replace("'", ""), f"train.steps={STEPS}", "schedule=cosine"),
    *(f"schedule.warmup_steps={WARMUP}", f"schedule.floor={FLOOR}"),
)


def trained(rank: int, size: int, config: RunConfig, degrees: Degrees) -> tuple[list[float], list[Block]]:
    """The norms that a run reports, and what this rank holds at its end."""
    config = laid_out(config, degrees)
    world = World(rank, size, torch.device("cpu"), open_axes(degrees, rank))
    loader, state = open_data(config, rank), build_state(config, world)
    fill(state, config)
    rows, _ = config.rank_rows(world.axes.batch.size)
    norms = []
    while state.step < STEPS:
        batch = loader.batch(state.cursor + world.axes.batch.rank * rows, rows)
        norms.append(train_step(state, batch, config, world).grad_norm)
    return norms, list(blocks_of(state))


def whole(model: LanguageModel, ranks: Sequence[list[Block]]) -> dict[str, Tensor]:
    """Weights of all ranks together; NaN where a part is missing."""
    found = {name: torch.full_like(x, torch.nan, dtype=torch.float64) for name, x in model.named_parameters()}
    for block in (block for blocks in ranks for block in blocks):
        block.piece.global_view(found[block.name]).copy_(block.weight)
    return found


def rate(step: int) -> float:
    """The learning rate of a step, from 0: linear to the peak, then half a cosine over the rest."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    angle = math.pi * (step - WARMUP) / (STEPS - WARMUP)
    return LR * (FLOOR + (1 - FLOOR) * (1 + math.cos(angle)) / 2)


def scale_of(name: str) -> float:
    return next((scale for like, scale in reversed(SCALES.items()) if fnmatchcase(name, like)), 1.0)


class AdamW:
    """Algorithm 2 of arXiv 1711.05101 on plain tensors."""

    def __init__(self, model: LanguageModel) -> None:
        self.weights = dict(model.named_parameters())
        self.means = {name: torch.zeros_like(x) for name, x in self.weights.items()}
        self.squares = {name: torch.zeros_like(x) for name, x in self.weights.items()}

    @torch.no_grad()
    def step(self, number: int) -> float:
        """The step with this number, from 0, with the gradients there are; gives their norm."""
        trained = {name: x for name, x in self.weights.items() if scale_of(name)}
        norm = math.sqrt(sum(float(x.grad.square().sum()) for x in trained.values() if x.grad is not None))
        for name, x in trained.items():
            if x.grad is None:
                continue
            gradient = x.grad * min(1.0, CLIP / (norm + 1e-6))
            mean, square, lr = self.means[name], self.squares[name], rate(number) * scale_of(name)
            mean.copy_(BETA1 * mean + (1 - BETA1) * gradient)
            square.copy_(BETA2 * square + (1 - BETA2) * gradient**2)
            if any(fnmatchcase(name, like) for like in DECAYED):
                x *= 1 - lr * DECAY
            corrected = mean / (1 - BETA1 ** (number + 1)), square / (1 - BETA2 ** (number + 1))
            x -= lr * corrected[0] / (corrected[1].sqrt() + EPS)
        return norm


@pytest.fixture(scope="module")
def config(short_documents: Path) -> RunConfig:
    return config_of("gdn attn", "float64", short_documents, *KEYS)


@pytest.fixture(scope="module")
def by_hand(config: RunConfig) -> tuple[LanguageModel, list[float]]:
    """The model after all steps, and the norm of each."""
    model = LanguageModel(config.architecture, torch.float64).double()
    loader, rows = open_data(config, 0), config.train.global_batch
    fill_plain(model)
    optimizer, norms = AdamW(model), []
    for number in range(STEPS):
        batch: Batch = loader.batch(number * rows, rows)
        model.zero_grad()
        sequence = Rows(batch.position, batch.document, batch.tokens)
        losses = model.loss(batch.tokens, batch.targets, sequence)
        (losses.cross_entropy / (batch.targets != -100).sum()).backward()
        norms.append(optimizer.step(number))
    return model, norms


def fill_plain(model: LanguageModel) -> None:
    from model.initial import initial_values
    from tests.parallel.layouts import value_of

    initials = initial_values(model)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(value_of(name, initials[name], x.shape))


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(dp_shard=2), Degrees(tp=2)], ids=["1", "dp2", "tp2"])
def test_weights_after_some_steps_are_those_of_adamw(
    config: RunConfig, by_hand: tuple[LanguageModel, list[float]], degrees: Degrees
) -> None:
    model, norms = by_hand
    ranks = run_world(degrees.size, trained, config, degrees, timeout=200)
    assert ranks[0][0] == pytest.approx(norms, rel=1e-10)
    # Some steps are clipped and some are not.
    assert min(norms) < 0.95 * CLIP < 1.05 * CLIP < max(norms)
    found = whole(model, [blocks for _, blocks in ranks])
    off = {name: apart(found[name], x.detach()) for name, x in model.named_parameters()}
    assert max(off.values()) < 1e-9, off
