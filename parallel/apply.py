"""A plain model made parallel from outside, in one visible order."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from model.block import Block
from model.config import Architecture
from model.initial import initial_values, sample
from model.language_model import LanguageModel, ModelPart
from model.linear import Initial
from parallel.block.compile import Backend, Fuser
from parallel.block.offload import Offload
from parallel.block.recompute import recompute
from parallel.config.parallel import ParallelConfig
from parallel.mesh.axes import Axes
from parallel.mesh.collectives import sum_over
from parallel.mesh.world import World
from parallel.micro_batches import Runner, WholeModel
from parallel.pipeline.partition import stage_layers
from parallel.pipeline.runner import Pipeline, Stage, build_stages
from parallel.shard.deepep import open_deepep
from parallel.shard.expert import AllToAll, Dispatcher, apply_ep
from parallel.shard.fsdp import apply_fsdp
from parallel.shard.shard_map import ShardMap, local_slices, replicated
from parallel.shard.shard_view import GlobalShardView
from parallel.shard.tensor import apply_tp, sum_shared_gradients


class StepShape(NamedTuple):
    """What a rank does in a step: micro-batches, and the rows of each; tokens are those of a whole row."""

    micro_batches: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Parallel:
    """This rank's parts of a model, one without a pipeline, and where its parameters lie in the whole.

    Parameters have the names of the whole model. names are all that a checkpoint of the whole model holds,
    decayed those that weight decay is for.
    """

    parts: tuple[ModelPart, ...]
    shard_maps: Mapping[str, ShardMap]
    runner: Runner
    names: frozenset[str]
    decayed: frozenset[str]

    @property
    def whole(self) -> LanguageModel | None:
        """The model, where all of its layers are here."""
        part = self.parts[0]
        return part if isinstance(part, LanguageModel) else None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters here. Where both ends of a pipeline are, a table that both hold comes twice."""
        return chain.from_iterable(part.named_parameters() for part in self.parts)

    def counted_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters without those that an earlier stage holds as well: the last one's embedding."""
        for part in self.parts:
            for name, parameter in part.named_parameters():
                if part.is_first or part.embed is None or parameter is not part.embed.weight:
                    yield name, parameter

    def modules(self) -> Iterator[nn.Module]:
        """All modules here."""
        return chain.from_iterable(part.modules() for part in self.parts)

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers here by name; a table at both ends is that of the first."""
        return {name: x for part in reversed(self.parts) for name, x in part.state_dict().items()}

    def tied_copies(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Parameters that two parts here hold alike; `state` names the first of each pair."""
        first, last = self.parts[0], self.parts[-1]
        if first is not last and first.embed is not None and last.embed is not None:
            yield first.embed.weight, last.embed.weight

    def checkpoint_view(self, name: str, x: Tensor) -> Tensor:
        """A parameter, or what has its form, as checkpoints take it."""
        is_whole = not isinstance(x, DTensor) and x.shape == self.shard_maps[name].shape
        return x if is_whole else GlobalShardView.of(x, self.shard_maps[name])

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Parameters and buffers here by name, as checkpoints take them."""
        return {
            name: self.checkpoint_view(name, value) if name in self.shard_maps else value
            for name, value in self.state().items()
        }

    def sum_shared_gradients(self, axes: Axes) -> None:
        """Sums what several ranks hold the same copy of, beyond data parallelism; once, after backward."""
        sum_shared_gradients(self.named_parameters(), self.shard_maps, axes.tp)

    @torch.no_grad()
    def fill(self, name: str, x: Tensor, whole: Tensor) -> None:
        """Copies from the whole parameter what this rank holds of it into x, which has its form."""
        for block, piece in local_slices(x.detach(), self.shard_maps[name]):
            block.copy_(piece.global_view(whole))

    def update_expert_biases(self, load: Tensor) -> None:
        """Moves every router's bias by its load [M E] over the whole global batch. Mutates the biases."""
        for part in self.parts:
            part.update_expert_biases(load[part.rows] if isinstance(part, Stage) else load)


def build_parallel(
    config: Architecture,
    dtypes: tuple[torch.dtype, torch.dtype],
    parallel: ParallelConfig,
    world: World,
    seed: int,
    step_shape: StepShape,
    backend: Backend = "inductor",
) -> Parallel:
    """The model of this rank on its device, with its first values, which do not depend on the layout.

    dtypes are those of the parameters and of the computation. backend is what compiles, where `parallel` asks
    for it.
    """
    built, initials = build_on_meta(config, dtypes, parallel, world, step_shape, backend=backend)
    _allocate(built, world.device)
    _initialise(built, initials, seed)
    return built


def build_empty(
    config: Architecture,
    dtypes: tuple[torch.dtype, torch.dtype],
    parallel: ParallelConfig,
    world: World,
    step_shape: StepShape,
) -> Parallel:
    """The same, its parameters whatever memory holds: for weights that are read from elsewhere."""
    built, _ = build_on_meta(config, dtypes, parallel, world, step_shape)
    _allocate(built, world.device)
    return built


def build_on_meta(
    config: Architecture,
    dtypes: tuple[torch.dtype, torch.dtype],
    parallel: ParallelConfig,
    world: World,
    step_shape: StepShape,
    kept: Collection[int] | None = None,
    link: type[PipelineStage] = PipelineStage,
    backend: Backend = "inductor",
) -> tuple[Parallel, dict[str, Initial]]:
    """The model of this rank on the meta device, without memory, and how its whole parameters start.

    kept are the layers that it has; a rehearsal leaves out those that are like others. All by default. link
    ties stages of a pipeline. backend as in `build_parallel`.
    """
    axes, plan = world.axes, parallel.plan(step_shape.micro_batches)
    kept = range(config.model.depth) if kept is None else kept
    with torch.device("meta"):
        whole = LanguageModel(config, dtypes[1], sorted(kept))
        parts: list[ModelPart] = [whole]
        if plan is not None:
            cut = stage_layers(config, plan, step_shape.tokens, parallel.pp_layout)
            layers = [[layer for layer in stage if layer in kept] for stage in cut]
            parts = [*build_stages(config, dtypes[1], plan, axes.pp.rank, layers)]
    initials, names = initial_values(whole), frozenset(whole.state_dict())
    shard_maps: dict[str, ShardMap] = {}
    dispatcher = _dispatcher(parallel, world)
    fuse = Fuser(backend) if parallel.compile else None
    for part in parts:
        part.to(dtypes[0])
        if fuse is not None:
            fuse(part)
        shard_maps |= _apply_spmd(part, config, parallel, world, dispatcher)
    runner: Runner = WholeModel(whole)
    if plan is not None:
        stages = [part for part in parts if isinstance(part, Stage)]
        shape = (step_shape.rows, step_shape.tokens // axes.cp.size)
        runner = Pipeline(stages, axes.pp, plan, shape, world.device, axes.tp.size, link)
    decayed = frozenset(name for name, initial in initials.items() if initial.is_decayed)
    return Parallel(tuple(parts), shard_maps, runner, names, decayed), initials


def _dispatcher(parallel: ParallelConfig, world: World) -> Dispatcher:
    if parallel.ep_dispatch == "deepep" and world.axes.ep.size > 1:
        return open_deepep(world.axes.ep, world.device)
    return AllToAll


def _apply_spmd(
    part: ModelPart, config: Architecture, parallel: ParallelConfig, world: World, dispatcher: Dispatcher
) -> dict[str, ShardMap]:
    """Leaves this rank its share of a part, which stands on the meta device; gives the shard maps."""
    axes = world.axes
    shard_maps = {name: replicated(parameter.shape) for name, parameter in part.named_parameters()}
    if axes.tp.size > 1:
        shard_maps = apply_tp(part, config, axes.tp)
    shard_maps |= apply_ep(part, axes, dispatcher)
    apply_activation_memory(part, parallel)
    if world.size > 1 and parallel.data == "fsdp":
        frees, prefetch = parallel.reshard_after_forward, parallel.prefetch
        apply_fsdp(part, axes, world.device.type, reshard_after_forward=frees, prefetch=prefetch)
    for router in part.routers():
        router.sum_load = partial(sum_over, axis=axes.tokens)
        router.row_parts = axes.sequence.size
        router.sum_row_load = partial(sum_over, axis=axes.sequence)
    return shard_maps


def apply_activation_memory(part: ModelPart, parallel: ParallelConfig) -> None:
    """Makes every block leave backward what `parallel` asks for. Mutates the blocks."""
    for block in part.modules():
        if isinstance(block, Block):
            recompute(block, parallel.recomputed, uses_rng=part.config.residual.dropout > 0)
            if parallel.offload == "activations":
                block.run = Offload(block, block.run)


@torch.no_grad()
def _allocate(built: Parallel, device: torch.device) -> None:
    """Memory for all parts, buffers with their first values."""
    for part in built.parts:
        part.to_empty(device=device)
    for module in built.modules():
        _reset_buffers(module)


@torch.no_grad()
def _initialise(built: Parallel, initials: Mapping[str, Initial], seed: int) -> None:
    for name, parameter in built.named_parameters():
        # Every rank draws the same values and keeps its part: no broadcast.
        built.fill(name, parameter, sample(name, initials[name], built.shard_maps[name].shape, seed))


def _reset_buffers(module: nn.Module) -> None:
    if next(module.buffers(recurse=False), None) is not None:
        reset = getattr(module, "reset_buffers", None)
        assert callable(reset), f"{type(module).__name__} has buffers and no reset_buffers"
        reset()
