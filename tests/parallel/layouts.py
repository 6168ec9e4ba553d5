"""One step of a model with every mixer, on one process and in any layout: the same losses and gradients."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from conf.compose import compose, group_options
from data.loader import Batch
from model.block import Block
from model.config import Architecture
from model.initial import initial_values, sample
from model.language_model import LanguageModel, Losses
from model.linear import Initial
from model.mixer import Mixer, Sequence
from model.moe.layer import Experts
from model.moe.router import Router
from model.tensor_shards import ALL_HEADS
from parallel.apply import Parallel, StepShape, build_parallel
from parallel.block.compile import Backend
from parallel.block.offload import Offload
from parallel.config.degrees import Degrees
from parallel.config.parallel import ParallelConfig
from parallel.context.sharding import cut_rows
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from parallel.micro_batches import Denominators
from parallel.shard.shard_map import local_slices
from tests.architectures import SMALL
from tests.closeness import moved_by

ROWS, TOKENS = 4, 32
SEED = 5
# As in training: some mixers then have losses of their own.
UNIFORM = 0.3
# Counts that two and four ranks can share, and enough of every kind of layer.
EVEN = (
    "mixer.mla.num_heads=4",
    "mixer.kda.num_heads=4",
    "mixer.lightning.num_heads=4",
    "mixer.mamba2.num_key_heads=2",
    "mixer.hca.output_groups=2",
    "moe.balance_loss=0.01",
    "moe.z_loss=0.01",
    "model.z_loss=0.001",
)


def batch_of(vocabulary: int) -> Batch:
    """Documents of all lengths, other ones in each row, and targets that are missing at their ends."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocabulary, (ROWS, TOKENS), generator=generator)
    document = (torch.rand(ROWS, TOKENS, generator=generator) < 0.1).long().cumsum(1)
    document[-1] = 0
    is_start = torch.nn.functional.pad(document.diff(dim=1) != 0, (1, 0), value=True)
    index = torch.arange(TOKENS).expand(ROWS, -1)
    position = index - torch.where(is_start, index, 0).cummax(1).values
    targets = tokens.roll(-1, 1).masked_fill(is_start.roll(-1, 1), -100)
    return Batch(tokens, targets, document, position, torch.arange(ROWS))


def architecture_of(overrides: Items[str] = (), mixers: Items[str] | None = None) -> Architecture:
    """A model with a layer of each mixer, dense and mixture of experts in turn."""
    names = list(mixers or sorted(group_options("mixer"), key=lambda name: name == "dsa_shared"))
    pattern = (
        f"layout.pattern={' '.join(names)}",
        f"model.depth={len(names)}",
        "layout.ffn.pattern=moe dense",
    )
    return compose([*SMALL, *EVEN, *pattern, *overrides], Architecture)


def value_of(name: str, initial: Initial, shape: torch.Size) -> Tensor:
    """The whole of a parameter: near its first value, and never constant."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 7 * len(name))
    return (
        sample(name, initial, shape, SEED).double() + 0.1 * torch.randn(shape, generator=generator).double()
    )


class Result(NamedTuple):
    """Losses of the global batch, and gradients of whole parameters by name."""

    losses: dict[str, Tensor]
    grads: dict[str, Tensor]


def targets_of(targets: Tensor, document: Tensor, ahead: int) -> int:
    """How many tokens have one of their own document `1 + ahead` later, counted one by one."""
    rows = zip(document.tolist(), targets.tolist(), strict=True)
    return sum(
        target[index + ahead] != -100 and row[index + ahead] == row[index]
        for row, target in rows
        for index in range(len(row) - ahead)
    )


def denominators_of(batch: Batch, config: Architecture) -> Denominators:
    """The counts of a global batch."""
    mtp = config.model.mtp
    targets = [targets_of(batch.targets, batch.document, ahead) for ahead in range(1 + mtp.depth)]
    return Denominators(torch.tensor(targets), batch.tokens.numel(), mtp.coefficient)


def objective_of(losses: Losses, batch: Batch, config: Architecture) -> Tensor:
    """The number whose gradient a step takes; losses of a part of the batch give their share of it."""
    counts, mtp = denominators_of(batch, config).targets.tolist(), config.model.mtp
    total = (losses.cross_entropy + losses.logit_z[0]) / counts[0]
    for ahead, loss in enumerate(losses.mtp, 1):
        total = total + mtp.coefficient / mtp.depth * (loss + losses.logit_z[ahead]) / counts[ahead]
    return total + sum(losses.auxiliary.values(), total.new_zeros(())) / batch.tokens.numel()


def named(losses: Losses) -> dict[str, Tensor]:
    """Losses by name, detached."""
    parts: dict[str, Any] = losses._asdict() | losses.auxiliary
    return {name: part.detach() for name, part in parts.items() if isinstance(part, Tensor)}


def alone(config: Architecture, draw: int | None = None) -> Result:
    """One process, without anything of parallel/; draw: its weights moved by an eps of float32."""
    model = LanguageModel(config, torch.float64).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(value_of(name, initial_values(model)[name], parameter.shape))
        weights = list(model.parameters())
        eps = torch.finfo(torch.float32).eps
        moved = weights if draw is None else moved_by(weights, eps, draw)
        for weight, other in zip(weights, moved, strict=True):
            weight.copy_(other)
    batch = batch_of(config.model.vocab_size)
    sequence = Sequence(batch.position, batch.document, batch.tokens, uniform=UNIFORM)
    losses = model.loss(batch.tokens, batch.targets, sequence)
    objective_of(losses, batch, config).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result(named(losses), grads)


def build(
    config: Architecture,
    degrees: Degrees,
    rank: int,
    keys: Mapping[str, Any] | None = None,
    backend: Backend = "inductor",
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64),
) -> tuple[Parallel, World]:
    """This rank's part with the values of `alone`, in dtypes of parameters and of computation.

    keys: other keys of `parallel`. backend: what compiles.
    """
    world = World(rank, degrees.size, torch.device("cpu"), open_axes(degrees, rank))
    settings = {"data": "fsdp", "dp_replicate": degrees.dp_replicate, "dp_shard": degrees.dp_shard}
    settings |= {"cp": degrees.cp, "tp": degrees.tp, "ep": degrees.ep, "pp": degrees.pp}
    settings |= {
        "pp_schedule": "1f1b",
        "pp_chunks": None,
        "pp_layout": None,
        "timeout_seconds": 60,
        "storage_timeout_seconds": 60,
    }
    settings |= {"zero": {"stage": 2, "offload": "none", "whole_below": 0}}
    settings |= {"reshard_after_forward": True, "recompute": "none", "offload": "none", "compile": False}
    settings |= {"prefetch": 0}
    settings |= {"ep_dispatch": "all_to_all", **(keys or {})}
    parallel = ParallelConfig(**settings)
    micro = micro_of(degrees)
    work = StepShape(ROWS // degrees.batch // micro, micro, TOKENS)
    built = build_parallel(config, dtypes, parallel, world, SEED, work, backend)
    with torch.device("meta"):
        initials = initial_values(LanguageModel(config))
    for module in built.modules():
        if isinstance(module, Block) and isinstance(module.run, Offload):
            module.run = replace(module.run, least_bytes=0)
    for name, parameter in built.named_parameters():
        built.fill(name, parameter, value_of(name, initials[name], built.shard_maps[name].shape))
    return built, world


def micro_of(degrees: Degrees) -> int:
    """Rows of a micro-batch: a pipeline wants several."""
    return 1 if degrees.pp > 1 else ROWS // degrees.batch


def on_rank(
    rank: int,
    size: int,
    config: Architecture,
    degrees: Degrees,
    fault: str = "",
    keys: Mapping[str, Any] | None = None,
    backend: Backend = "inductor",
) -> tuple[dict[str, Tensor], list[Any]]:
    """Losses summed over ranks, and the blocks of gradients that this rank holds.

    fault breaks one thing that layouts stand on. keys: other keys of `parallel`. backend: what compiles.
    """
    built, world = build(config, degrees, rank, keys, backend)
    break_it(built, fault)
    batch = batch_of(config.model.vocab_size)
    denominators = denominators_of(batch, config)
    own = slice(world.axes.batch.rank, None, world.axes.batch.size)
    rows = [part[own].split(micro_of(degrees)) for part in batch]
    options = {"uniform": UNIFORM, "mtp_depth": config.model.mtp.depth}
    batches = [cut_rows(Batch(*parts), world.axes.cp, **options) for parts in zip(*rows, strict=True)]
    losses = built.runner.step(batches, denominators)
    if fault != "gradients of copies":
        built.sum_shared_gradients(world.axes)
    found = named(losses)
    for part in found.values():
        dist.all_reduce(part)
    blocks = []
    for name, parameter in built.named_parameters():
        if parameter.grad is not None:
            held = local_slices(parameter.grad, built.shard_maps[name])
            blocks += [(name, piece, block.clone()) for block, piece in held]
    return found, blocks


class CopiesDifferError(Exception):
    """Two ranks have different gradients of the same parameter."""


def break_it(built: Parallel, fault: str) -> None:
    """Makes a model wrong in one way. Mutates it."""
    for module in built.modules():
        if fault == "mean of gradients" and isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(2.0)
        if fault == "load of a row" and isinstance(module, Router):
            module.sum_row_load = lambda load: load
        if fault == "share of a decay" and isinstance(module, Mixer):
            module.head_shards = ALL_HEADS
        if fault == "order of experts" and isinstance(module, Experts):
            with torch.no_grad():
                gate_up = module.gate_up
                held = gate_up.to_local() if isinstance(gate_up, DTensor) else gate_up
                held.copy_(held.flip(0))


def assembled(reference: Result, ranks: list[tuple[dict[str, Tensor], list[Any]]]) -> Result:
    """Whole gradients; NaN where a part is missing.

    Raises CopiesDifferError where two ranks hold different copies."""
    grads = {name: torch.full_like(grad, torch.nan) for name, grad in reference.grads.items()}
    for _, blocks in ranks:
        for name, piece, block in blocks:
            whole = piece.global_view(grads[name])
            if not bool(((whole == block) | whole.isnan()).all()):
                raise CopiesDifferError(name)
            whole.copy_(block)
    return Result(ranks[0][0], grads)


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number."""
    if expected.numel() == 0:
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()
