"""Data parallelism: FSDP2 over dp_shard, copies over dp_replicate."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from model.language_model import LanguageModel, Part
from model.residual import Residual
from parallel.config import ParallelConfig


def shard_data(model: Part, config: ParallelConfig, mesh: DeviceMesh) -> None:
    """Shards each block, then what is left. Mutates the model: its parameters become DTensors.

    Gradients are summed over ranks, never averaged: the loss is divided by global counts beforehand.
    """
    axes = ("dp_replicate", "dp_shard") if config.dp_replicate > 1 else ("dp_shard",)
    reduce_dtype = torch.promote_types(model.dtype, torch.float32)
    low = MixedPrecisionPolicy(model.dtype, reduce_dtype, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(reduce_dtype, reduce_dtype, cast_forward_inputs=False)
    reshard = config.reshard_after_forward

    def shard(module: nn.Module, policy: MixedPrecisionPolicy, *, frees: bool) -> None:
        fully_shard(module, mesh=mesh[axes], mp_policy=policy, reshard_after_forward=frees)
        if isinstance(module, Residual):
            register_fsdp_forward_method(module, "read")

    for block in [*model.blocks, *model.predictions]:
        if low.param_dtype != full.param_dtype:
            for module in list(block.modules()):
                if getattr(module, "needs_full_precision", False):
                    shard(module, full, frees=reshard)
        shard(block, low, frees=reshard)
    # The root holds embedding, norm and head; backward needs them at once.
    shard(model, low, frees=False)
    if isinstance(model, LanguageModel):
        register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reduce_over_copies(model: nn.Module, *, is_last: bool) -> None:
    """Whether the next backward also sums gradients over dp_replicate; the last micro-batch must."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)
