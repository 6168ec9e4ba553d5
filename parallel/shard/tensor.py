"""Tensor parallelism with sequence-parallel norms.

Between mixers and feed-forwards a rank holds its part of the tokens. Before each, the parts are gathered; it
computes its heads, or its hidden units, for all of them; and what it gives is summed over ranks and scattered
again. Nothing inside knows of it: a rank's mixer is an ordinary mixer with fewer heads.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.block import Block
from model.config import Architecture
from model.ffn import FeedForward
from model.language_model import ModelPart
from model.linear import Linear
from model.mixer import Mixed, TPShard
from parallel.mesh.axes import Axis
from parallel.mesh.collectives import gather, gathered, reduce_scatter, sum_neighbours, sum_over
from parallel.shard.shard_map import ShardMap, local_slices, replicated, tp_shard_map
from parallel.shard.vocabulary import ShardedVocab


@dataclass(frozen=True)
class TensorHeadShards:
    """The ranks that hold the other heads of a mixer."""

    axis: Axis
    kv_replicas: int

    @property
    def rank(self) -> int:
        """Which share of the heads is here."""
        return self.axis.rank

    @property
    def size(self) -> int:
        """Into how many shares the heads are cut."""
        return self.axis.size

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the shares; so is its gradient."""
        return sum_over(x, self.axis)

    def sum_kv_replicas(self, x: Tensor) -> Tensor:
        """x summed over the neighbours that share a key head; so is its gradient."""
        return sum_neighbours(x, self.axis, self.kv_replicas)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """The x of all shares along a dim, in order, without a gradient."""
        return gathered(x, self.axis, dim)


def apply_tp(model: ModelPart, config: Architecture, axis: Axis) -> dict[str, ShardMap]:
    """Leaves this rank its heads, hidden units, and rows of the vocabulary. Mutates the model.

    The model must stand on the meta device. Gives the shard maps of all parameters but routed experts.

    Raises ValueError for a mixer that cannot be cut so many ways.
    """
    shard_maps = {
        name: replicated(parameter.shape, axis.size) for name, parameter in model.named_parameters()
    }
    for prefix, block in model.named_modules():
        if isinstance(block, Block):
            shard_maps |= _apply_tp_to_block(prefix, block, config, axis)
    model.vocabulary = ShardedVocab(axis)
    tables = {"embed": model.embed, "head": model.head}
    for name, table in tables.items():
        if table is None:
            continue
        key, whole = f"{name}.weight", table.weight
        if whole.shape[0] % axis.size:
            raise ValueError(f"{axis.name}: {axis.size} ranks do not divide {whole.shape[0]} rows of {key}")
        part = torch.Size((whole.shape[0] // axis.size, whole.shape[1]))
        shard_maps[key] = tp_shard_map(whole.shape, TPShard(0), TPShard(0), part, axis.rank, axis.size)
        table.weight = nn.Parameter(whole.new_empty(part))
    return shard_maps


def _apply_tp_to_block(prefix: str, block: Block, config: Architecture, axis: Axis) -> dict[str, ShardMap]:
    shard_maps: dict[str, ShardMap] = {}
    width = config.model.width
    if block.mixer is not None:
        whole, entry = block.mixer, config.mixer[block.names.mixer]
        parts = entry.per_rank(axis.size)
        splits, part_splits = entry.tp_plan(width), parts.tp_plan(width)
        with torch.device("meta"):
            block.mixer = parts.build(width, block.layer, config.model.depth, config.model.init_std)
        block.mixer.to(next(whole.parameters()).dtype)
        block.mixer.head_shards = TensorHeadShards(axis, entry.kv_replicas(axis.size))
        for name, parameter in block.mixer.named_parameters():
            shape = whole.get_parameter(name).shape
            found = tp_shard_map(
                shape, splits[name], part_splits[name], parameter.shape, axis.rank, axis.size
            )
            shard_maps[f"{prefix}.mixer.{name}"] = found
        for name, split in splits.items():
            linear = block.mixer.get_submodule(name.rpartition(".")[0])
            if split.dim == 1 and isinstance(linear, Linear):
                # Each rank adds its share of the bias to its share of the sum.
                linear.bias_share = 1.0 / axis.size
        _meet(block.mixer, axis)
    if block.ffn is not None:
        shard_maps |= _apply_tp_to_ffn(f"{prefix}.ffn", block.ffn, axis)
    if block.moe is not None:
        block.moe.register_forward_pre_hook(_OwnTokens(axis))
        if block.moe.shared is not None:
            shard_maps |= _apply_tp_to_ffn(f"{prefix}.moe.shared", block.moe.shared, axis)
    return shard_maps


def _apply_tp_to_ffn(prefix: str, ffn: FeedForward, axis: Axis) -> dict[str, ShardMap]:
    """Hidden units are cut; gates and ups of the same unit stay together."""
    hidden, rows = ffn.down.weight.shape[1], ffn.gate_up.weight.shape[0]
    if hidden % axis.size:
        raise ValueError(
            f"{axis.name}: {axis.size} ranks do not divide the {hidden} hidden units of {prefix}"
        )
    halves = rows // hidden
    part = hidden // axis.size
    shard_maps = {}
    for name, split, own in (
        ("gate_up", TPShard(0, (hidden,) * halves), TPShard(0, (part,) * halves)),
        ("down", TPShard(1), TPShard(1)),
    ):
        linear = getattr(ffn, name)
        shape, sizes = linear.weight.shape, list(linear.weight.shape)
        sizes[split.dim or 0] //= axis.size
        shard_maps[f"{prefix}.{name}.weight"] = tp_shard_map(
            shape, split, own, torch.Size(sizes), axis.rank, axis.size
        )
        linear.weight = nn.Parameter(linear.weight.new_empty(sizes))
    _meet(ffn, axis)
    return shard_maps


def _meet(module: nn.Module, axis: Axis) -> None:
    """Gathers tokens before the module, and sums and scatters what it gives after it."""
    module.register_forward_pre_hook(_Enter(axis))
    module.register_forward_hook(_Leave(axis))


@dataclass(frozen=True)
class _Enter:
    axis: Axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather(args[0], self.axis, 1), *args[1:]


@dataclass(frozen=True)
class _Leave:
    axis: Axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor | Mixed) -> Tensor | Mixed:
        if isinstance(out, Mixed):
            return out._replace(out=reduce_scatter(out.out, self.axis, 1))
        return reduce_scatter(out, self.axis, 1)


@dataclass(frozen=True)
class _OwnTokens:
    """Gives the router the ids of the tokens that are here."""

    axis: Axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, tokens = args
        return x, tokens.unflatten(1, (self.axis.size, -1))[:, self.axis.rank]


@torch.no_grad()
def sum_shared_gradients(
    parameters: Iterable[tuple[str, nn.Parameter]], shard_maps: Mapping[str, ShardMap], axis: Axis
) -> None:
    """Sums the gradients of blocks that ranks of the tensor axis share, in place; one collective per dtype.

    Call it once per step, after the last backward.
    """
    if axis.size == 1:
        return
    slots: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for name, parameter in parameters:
        if parameter.grad is None:
            continue
        for block, piece in local_slices(parameter.grad, shard_maps[name]):
            if piece.replicas > 1:
                # Neighbours that share a block meet in one slot of their own.
                bucket = block.new_zeros(axis.size // piece.replicas, block.numel())
                own = bucket[axis.rank // piece.replicas]
                own.copy_(block.flatten())
                slots.setdefault(block.dtype, []).append((block, bucket))
    for pairs in slots.values():
        sizes = [bucket.numel() for _, bucket in pairs]
        total = sum_over(torch.cat([bucket.flatten() for _, bucket in pairs]), axis)
        for (block, bucket), part in zip(pairs, total.split(sizes), strict=True):
            own = part.view_as(bucket)[axis.rank * bucket.shape[0] // axis.size]
            block.copy_(own.view_as(block))
