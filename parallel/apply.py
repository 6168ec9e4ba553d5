"""A plain model made parallel from outside, in one visible order."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.block import Block
from model.config import Architecture
from model.initial import draw, initial_values
from model.language_model import LanguageModel
from model.linear import Initial
from parallel.axes import Axes
from parallel.collectives import sum_over
from parallel.config import ParallelConfig
from parallel.data import shard_data
from parallel.expert import spread_experts
from parallel.offload import Offload
from parallel.placement import Placement, held_boxes, undivided
from parallel.recompute import recompute
from parallel.stored import Stored
from parallel.tensor import spread_tensors, sum_shared_gradients
from parallel.world import World


@dataclass(frozen=True)
class Parallel:
    """This rank's part of a model, and where each of its parameters lies in the whole one.

    Parameters have the names of the whole model.
    """

    model: LanguageModel
    placements: Mapping[str, Placement]

    def stored(self, name: str, x: Tensor) -> Tensor:
        """A parameter, or what has its form, as checkpoints take it."""
        is_whole = not isinstance(x, DTensor) and x.shape == self.placements[name].shape
        return x if is_whole else Stored.of(x, self.placements[name])

    def sum_shared_gradients(self, axes: Axes) -> None:
        """Sums what several ranks hold the same copy of, beyond data parallelism; once, after backward."""
        sum_shared_gradients(self.model, self.placements, axes.tp)

    @torch.no_grad()
    def fill(self, name: str, x: Tensor, whole: Tensor) -> None:
        """Copies from the whole parameter what this rank holds of it into x, which has its form."""
        for block, box in held_boxes(x.detach(), self.placements[name]):
            block.copy_(box.of_whole(whole))


def build_parallel(
    config: Architecture,
    dtypes: tuple[torch.dtype, torch.dtype],
    parallel: ParallelConfig,
    world: World,
    seed: int,
) -> Parallel:
    """The model of this rank on its device, with its first values, which do not depend on the layout.

    dtypes are those of the parameters and of the computation.
    """
    with torch.device("meta"):
        model = LanguageModel(config, dtypes[1])
    model.to(dtypes[0])
    initials = initial_values(model)
    placements = {name: undivided(parameter.shape) for name, parameter in model.named_parameters()}
    if world.axes.tp.size > 1:
        placements = spread_tensors(model, config, world.axes.tp)
    placements |= spread_experts(model, world.axes)
    keep_less(model, parallel)
    if world.size > 1:
        reshard = parallel.reshard_after_forward
        shard_data(model, world.axes, world.device.type, reshard_after_forward=reshard)
    for router in model.routers():
        router.sum_load = partial(sum_over, axis=world.axes.tokens)
        router.row_parts = world.axes.row.size
        router.sum_row_load = partial(sum_over, axis=world.axes.row)
    model.to_empty(device=world.device)
    built = Parallel(model, placements)
    _initialise(built, initials, seed)
    return built


def keep_less(model: LanguageModel, parallel: ParallelConfig) -> None:
    """Makes every block leave backward what `parallel` asks for. Mutates the blocks."""
    for block in model.modules():
        if isinstance(block, Block):
            recompute(block, parallel.recomputed, draws=model.config.residual.dropout > 0)
            if parallel.offload == "activations":
                block.run = Offload(block, block.run)


@torch.no_grad()
def _initialise(built: Parallel, initials: Mapping[str, Initial], seed: int) -> None:
    for name, parameter in built.model.named_parameters():
        # Every rank draws the same values and keeps its part: no broadcast.
        built.fill(name, parameter, draw(name, initials[name], built.placements[name].shape, seed))
    for module in built.model.modules():
        _reset_buffers(module)


def _reset_buffers(module: nn.Module) -> None:
    if next(module.buffers(recurse=False), None) is not None:
        reset = getattr(module, "reset_buffers", None)
        assert callable(reset), f"{type(module).__name__} has buffers and no reset_buffers"
        reset()
