"""Parameter groups of an optimizer over the parameters of a rank, and the global norm of their gradients."""

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from conf.errors import ConfigError, Violation
from parallel.apply import Parallel
from parallel.mesh.world import World
from parallel.shard.shard_map import local_slices
from train.optim.optimizer import OptimizerConfig


def build_optimizer(built: Parallel, config: OptimizerConfig) -> Optimizer:
    """The optimizer, with decay for those parameters that declare it where they declare their first value.

    Every group has `lr_scale`, its factor on the learning rate. Parameters whose factor is 0 are frozen: they
    get no gradient and are in no group. Mutates requires_grad.

    Raises ConfigError for a pattern of optim.lr_scales that no parameter fits.
    """
    groups: dict[tuple[bool, float, int], list[nn.Parameter]] = {}
    # One update over many tensors takes those of one mesh only.
    meshes: list[object] = []
    for name, parameter in built.named_parameters():
        scale = scale_of(name, config)
        parameter.requires_grad_(scale > 0)
        if scale:
            is_decayed = name in built.decayed
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            meshes += [mesh] * (mesh not in meshes)
            groups.setdefault((is_decayed, scale, meshes.index(mesh)), []).append(parameter)
    # Other ranks of a pipeline have other parameters; what is wrong is wrong on all of them.
    names = sorted(built.names)
    unused = [
        pattern for pattern in config.lr_scales if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if unused:
        message = f"fits no parameter; their names are like {names[0]} and {names[len(names) // 2]}"
        raise ConfigError([Violation(f"optim.lr_scales.{pattern}", message) for pattern in unused])
    if not any(scale_of(name, config) for name in names):
        raise ConfigError([Violation("optim.lr_scales", "freezes every parameter; leave some above 0")])
    ordered = sorted(groups.items(), key=lambda item: item[0], reverse=True)
    return config.build(
        [
            {"params": parameters, "weight_decay": config.weight_decay * is_decayed, "lr_scale": scale}
            for (is_decayed, scale, _), parameters in ordered
        ]
    )


def scale_of(name: str, config: OptimizerConfig) -> float:
    """The factor on the learning rate of a parameter: that of the last pattern which fits its name."""
    scales = [scale for pattern, scale in config.lr_scales.items() if fnmatchcase(name, pattern)]
    return scales[-1] if scales else 1.0


def gradient_norm(built: Parallel, world: World) -> Tensor:
    """The Euclidean norm of all gradients together, over all ranks, each number counted once; in float64."""
    blocks: dict[int, list[Tensor]] = {}
    for name, parameter in built.counted_parameters():
        if parameter.grad is not None:
            for block, piece in local_slices(parameter.grad, built.shard_maps[name]):
                blocks.setdefault(piece.replicas, []).append(block)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for replicas, parts in blocks.items():
        total += torch.nn.utils.get_total_norm(parts).double().square() / replicas
    return (world.sum(total) / world.axes.dp_replicate.size).sqrt()


def clip_gradients(built: Parallel, norm: Tensor, limit: float) -> None:
    """Scales all gradients in place so that their global norm is at most `limit`."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for _, parameter in built.named_parameters():
        if parameter.grad is not None:
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            local.mul_(scale)
