"""Training written by hand in float64: a plain model, AdamW, its schedule, groups, clipping and decay."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from data.loader import Batch
from model.initial import initial_values
from model.language_model import LanguageModel
from model.mixer import Sequence as Rows
from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from tests.parallel.equality import Block, blocks_of, fill, laid_out
from tests.parallel.layouts import objective_of, value_of
from train.config.run_config import RunConfig
from train.loop.run import build_state, open_data
from train.loop.step import train_step

STEPS, WARMUP, FLOOR = 7, 2, 0.2
LR, BETA1, BETA2, EPS, DECAY, CLIP = 0.02, 0.8, 0.9, 1e-3, 0.3, 2.5
SCALES = {"*.mixer.*": 0.25, "*.out_norm.weight": 0.0}
DECAYED = (
    *("*_proj.weight", "*.gate_up.weight", "*.down.weight", "head.weight"),
    *("*.experts.gate_up", "*.experts.down", "*.router.weight"),
)
KEYS = (
    *(f"optim.lr={LR}", f"optim.beta1={BETA1}", f"optim.beta2={BETA2}"),
    *(f"optim.eps={EPS}", f"optim.weight_decay={DECAY}", f"optim.clip_norm={CLIP}"),
    *(f"optim.lr_scales={SCALES}".replace("'", ""), f"train.steps={STEPS}", "schedule=cosine"),
    *(f"schedule.warmup_steps={WARMUP}", f"schedule.floor={FLOOR}"),
)


class Found(NamedTuple):
    """What a rank reports of each step, what it holds after the last, its random state before the first."""

    losses: list[float]
    norms: list[float]
    blocks: list[Block]
    random: Tensor


class Expected(NamedTuple):
    """The model after all steps, the mean of each gradient by name of parameter, the numbers of each step."""

    model: LanguageModel
    means: dict[str, Tensor]
    losses: list[float]
    norms: list[float]


def trained(rank: int, size: int, config: RunConfig, degrees: Degrees, steps: int = STEPS) -> Found:
    """This rank of a run, its first steps."""
    config = laid_out(config, degrees)
    world = World(rank, size, torch.device("cpu"), open_axes(degrees, rank))
    loader, state = open_data(config, rank), build_state(config, world)
    fill(state, config)
    rows, _ = config.rank_rows(world.axes.batch.size)
    random, results = torch.get_rng_state(), []
    while state.step < steps:
        batch = loader.batch(state.cursor + world.axes.batch.rank * rows, rows)
        results.append(train_step(state, batch, config, world))
    losses, norms = [result.loss for result in results], [result.grad_norm for result in results]
    return Found(losses, norms, list(blocks_of(state)), random)


def by_hand(
    config: RunConfig, randoms: Sequence[Tensor], micro_batches: int = 1, steps: int = STEPS
) -> Expected:
    """The first steps on one process, which is each rank in turn, with its rows in so many micro-batches.

    randoms are the random states of the ranks.
    """
    architecture = config.architecture
    model = LanguageModel(architecture, torch.float64).double()
    initials = initial_values(model)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(value_of(name, initials[name], x.shape))
    loader, rows, states = open_data(config, 0), config.train.global_batch, list(randoms)
    optimizer, losses, norms = AdamW(model, config.optim.clip_norm), [], []
    for number in range(steps):
        whole: Batch = loader.batch(number * rows, rows)
        micro = rows // len(states) // micro_batches
        parts = [Batch(*part) for part in zip(*(x.split(micro) for x in whole), strict=True)]
        model.zero_grad()
        total, load = 0.0, []
        for index, part in enumerate(parts):
            rank, turn = divmod(index, micro_batches)
            if turn == 0:
                torch.set_rng_state(states[rank])
            found = model.loss(part.tokens, part.targets, Rows(part.position, part.document, part.tokens))
            objective_of(found, whole, architecture).backward()
            states[rank] = torch.get_rng_state()
            total += found.cross_entropy.item()
            load.append(found.load)
        losses.append(total / int((whole.targets != -100).sum()))
        norms.append(optimizer.step(number))
        model.update_expert_biases(torch.stack(load).sum(0))
    return Expected(model, optimizer.means, losses, norms)


def differing(found: Sequence[Found], expected: Expected, limit: float) -> dict[str, float]:
    """How far each weight and mean that is farther than `limit` is off; copies on all ranks are looked at."""
    weights = {name: x.detach() for name, x in expected.model.named_parameters()}
    seen = {name: torch.zeros_like(x, dtype=torch.bool) for name, x in weights.items()}
    off: dict[str, float] = {}
    for rank, part in enumerate(found):
        for block in part.blocks:
            block.piece.global_view(seen[block.name]).fill_(True)
            pairs = [("weight", block.weight, weights), ("mean", block.moment, expected.means)]
            for kind, own, wholes in pairs:
                if own is not None:
                    whole = wholes[block.name]
                    distance = (own - block.piece.global_view(whole)).abs().max() if own.numel() else 0.0
                    off[f"{kind} of {block.name} on rank {rank}"] = float(distance / whole.abs().max())
    off |= {f"no rank has all of {name}": math.inf for name, part in seen.items() if not part.all()}
    return {name: distance for name, distance in off.items() if not distance < limit}


def rate(step: int) -> float:
    """The learning rate of a step, from 0: linear to the peak, then half a cosine over the rest."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    angle = math.pi * (step - WARMUP) / (STEPS - WARMUP)
    return LR * (FLOOR + (1 - FLOOR) * (1 + math.cos(angle)) / 2)


def scale_of(name: str) -> float:
    """The factor on the learning rate of a parameter."""
    return next((scale for like, scale in reversed(SCALES.items()) if fnmatchcase(name, like)), 1.0)


class AdamW:
    """Algorithm 2 of arXiv 1711.05101 on plain tensors."""

    def __init__(self, model: LanguageModel, clip: float) -> None:
        self.clip = clip
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
            gradient = x.grad * min(1.0, self.clip / (norm + 1e-6))
            mean, square, lr = self.means[name], self.squares[name], rate(number) * scale_of(name)
            mean.copy_(BETA1 * mean + (1 - BETA1) * gradient)
            square.copy_(BETA2 * square + (1 - BETA2) * gradient**2)
            if any(fnmatchcase(name, like) for like in DECAYED):
                x *= 1 - lr * DECAY
            corrected = mean / (1 - BETA1 ** (number + 1)), square / (1 - BETA2 ** (number + 1))
            x -= lr * corrected[0] / (corrected[1].sqrt() + EPS)
        return norm
