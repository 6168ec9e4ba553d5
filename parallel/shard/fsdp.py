"""Data parallelism: FSDP2 over the ranks that share a copy of the weights, copies over dp_replicate."""

import warnings
from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from model.language_model import LanguageModel, ModelPart
from model.moe.layer import Experts
from model.residual import Residual
from parallel.mesh.axes import Axes, Axis


def apply_fsdp(
    model: ModelPart, axes: Axes, device_type: str, *, reshard_after_forward: bool, prefetch: int = 0
) -> None:
    """Shards experts, then each block, then what is left. Mutates the model: parameters become DTensors.

    While a block computes, the weights of `prefetch` blocks after it are gathered; in backward, before it.

    Gradients are summed over ranks, never averaged: the loss is divided by global counts beforehand. Experts
    are shared by other ranks than the rest, so they have a mesh of their own.
    """
    # torch warns of every wrapped module that gives a view, lest somebody writes into it; nobody does here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    dense, expert = (data_mesh(axes, shard, device_type) for shard in (axes.shard, axes.edp))
    reduce_dtype = torch.promote_types(model.dtype, torch.float32)
    low = MixedPrecisionPolicy(model.dtype, reduce_dtype, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(reduce_dtype, reduce_dtype, cast_forward_inputs=False)
    apart: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, Experts) and axes.shard.ranks != axes.edp.ranks:
            if expert is not None:
                fully_shard(
                    module,
                    mesh=expert,
                    mp_policy=low,
                    reshard_after_forward=reshard_after_forward,
                    shard_placement_fn=lambda parameter: _cut_of(parameter, axes.edp.size),
                )
            apart.update(module.parameters())

    def shard(module: nn.Module, policy: MixedPrecisionPolicy, *, frees: bool) -> None:
        if dense is not None:
            fully_shard(
                module,
                mesh=dense,
                mp_policy=policy,
                reshard_after_forward=frees,
                ignored_params=apart,
                shard_placement_fn=lambda parameter: _cut_of_dense(parameter, axes.shard.size),
            )
        if isinstance(module, Residual) and isinstance(module, FSDPModule):
            register_fsdp_forward_method(module, "read")

    for block in [*model.blocks, *model.mtp]:
        if low.param_dtype != full.param_dtype:
            for module in list(block.modules()):
                if getattr(module, "needs_full_precision", False):
                    shard(module, full, frees=reshard_after_forward)
        shard(block, low, frees=reshard_after_forward)
    # The root holds embedding, norm and head; backward needs them at once.
    shard(model, low, frees=False)
    if dense is None and expert is not None:
        # A schedule gathers and sums all of a stage by its root, also where only experts are shared.
        fully_shard(model, mesh=expert, mp_policy=low, ignored_params=set(model.parameters()))
    if isinstance(model, FSDPModule) and isinstance(model, LanguageModel):
        register_fsdp_forward_method(model, "loss")
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "part_logits")
    if prefetch:
        _gather_ahead([*model.blocks], prefetch)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _gather_ahead(blocks: Sequence[nn.Module], count: int) -> None:
    # By itself FSDP2 gathers a block in forward when it is reached. Where tokens go to experts, the host
    # waits for their numbers within each block, so no gather is begun before the work of the block is done.
    parts = [[module for module in block.modules() if isinstance(module, FSDPModule)] for block in blocks]
    for index, block in enumerate(blocks):
        if isinstance(block, FSDPModule):
            later, before = parts[index + 1 : index + 1 + count], parts[max(0, index - count) : index]
            block.set_modules_to_forward_prefetch([*chain(*later)])
            block.set_modules_to_backward_prefetch([*chain(*reversed(before))])


def _cut_of(parameter: nn.Parameter, degree: int) -> Shard | None:
    # Fewer experts than ranks: each expert is cut along its rows.
    if parameter.shape[0] % degree and parameter.ndim > 1 and parameter.shape[1] % degree == 0:
        return Shard(1)
    return None


def _cut_of_dense(parameter: nn.Parameter, degree: int) -> Shard | None:
    # Fewer rows than ranks, as where each key head has a matrix: only the first ranks would hold anything.
    if parameter.shape[0] < degree:
        return next(
            (Shard(dim) for dim in range(1, parameter.ndim) if parameter.shape[dim] % degree == 0), None
        )
    return None


def data_mesh(axes: Axes, shard: Axis, device_type: str) -> DeviceMesh | None:
    """The mesh of copies and shards for parameters that `shard` shares; None where this rank has all."""
    copies = axes.dp_replicate
    if copies.size * shard.size == 1:
        return None
    if copies.size == 1:
        assert shard.group is not None, f"{shard=}"
        return DeviceMesh.from_group(shard.group, device_type, mesh_dim_names=("shard",))
    own = copies.ranks[copies.rank]
    ranks = [[rank + copy - own for rank in shard.ranks] for copy in copies.ranks]
    groups = [group for group in (copies.group, shard.group) if group is not None]
    assert len(groups) == 2, f"{copies=} {shard=}"
    names = ("copies", "shard")
    return DeviceMesh.from_group(groups, device_type, mesh=torch.tensor(ranks), mesh_dim_names=names)


def reduce_over_copies(model: nn.Module, *, is_last: bool) -> None:
    """Whether the next backward also sums gradients over dp_replicate; the last micro-batch must."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(is_last, recurse=False)
