"""What training keeps on one rank, measured on the tensors themselves."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel.apply import Parallel
from train.optim.optimizer import OptimizerConfig

KINDS = ("dense", "experts", "tables")
_TABLES = ("embed.", "head.")


def kind_of(built: Parallel, name: str) -> str:
    """Whether a parameter is of routed experts, of embedding or head, or dense."""
    if built.shard_maps[name].is_expert:
        return "experts"
    return "tables" if name.startswith(_TABLES) else "dense"


def local_bytes(built: Parallel, optimizer: Optimizer, config: OptimizerConfig) -> dict[str, dict[str, int]]:
    """Bytes of parameters, gradients and optimizer state on this rank, by kind of parameter and in all.

    Gradients and moments that a step has not made yet are counted in the form of their parameter.
    `allocated` is what the tensors that are there take, each piece of memory once: shards that are padded
    count with their padding.
    """
    rows = {kind: {"parameters": 0, "gradients": 0, "optimizer": 0} for kind in KINDS}
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    tensors: list[Tensor] = []
    for name, parameter in built.named_parameters():
        row, size = rows[kind_of(built, name)], bytes_of(parameter)
        row["parameters"] += size
        tensors.append(parameter.detach())
        if parameter in trained:
            row["gradients"] += size if parameter.grad is None else bytes_of(parameter.grad)
            state = [x for x in optimizer.state.get(parameter, {}).values() if isinstance(x, Tensor)]
            expected = len(config.slots) * size + 4 * config.counts_steps
            row["optimizer"] += sum(bytes_of(x) for x in state) if state else expected
            tensors += [x for x in (parameter.grad, *state) if x is not None]
    total = {what: sum(row[what] for row in rows.values()) for what in rows["dense"]}
    return rows | {"total": total | {"allocated": allocated_bytes(tensors)}}


def bytes_of(x: Tensor) -> int:
    """Bytes of the numbers that this rank holds of a tensor."""
    held = local_part(x)
    return held.numel() * held.element_size()


def allocated_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece once."""
    pieces = {local_part(x).untyped_storage()._cdata: local_part(x).untyped_storage() for x in tensors}
    return sum(piece.nbytes() for piece in pieces.values())


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    with torch.no_grad():
        return x.to_local() if isinstance(x, DTensor) else x
