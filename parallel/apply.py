"""A plain model made parallel from outside, in one visible order."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model.initial import draw, initial_values
from model.language_model import LanguageModel
from parallel.config import ParallelConfig
from parallel.data import shard_data
from parallel.world import World


def build_parallel(model: LanguageModel, config: ParallelConfig, world: World, seed: int) -> LanguageModel:
    """The model of this rank: sharded, on its device, with its first values.

    model must stand on the meta device; it is changed in place. First values do not depend on the layout.
    """
    initials = initial_values(model)
    if world.mesh is not None:
        shard_data(model, config, world.mesh)
        for router in model.routers():
            router.sum_load = world.sum
    model.to_empty(device=world.device)
    _initialise(model, initials, seed)
    return model


@torch.no_grad()
def _initialise(model: nn.Module, initials: dict, seed: int) -> None:
    for name, parameter in model.named_parameters():
        value = draw(name, initials[name], parameter.shape, seed).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            # Every rank draws the same values and keeps its part: no broadcast.
            value = value.to(parameter.device)
            part = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(value)
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            reset = getattr(module, "reset_buffers", None)
            assert callable(reset), f"{type(module).__name__} has buffers and no reset_buffers"
            reset()
