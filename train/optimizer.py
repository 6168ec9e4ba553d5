"""AdamW over the parameters of a model, and the global norm of their gradients."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from conf.errors import ConfigError, Violation
from parallel.apply import Parallel
from parallel.placement import held_boxes
from parallel.world import World
from train.fields import AdamwConfig


def build_optimizer(model: nn.Module, config: AdamwConfig) -> AdamW:
    """AdamW that decays matrices and stacks of matrices, but neither vectors nor the embedding.

    Every group has `lr_scale`, its factor on the learning rate. Parameters whose factor is 0 are frozen: they
    get no gradient and are in no group. Mutates requires_grad.

    Raises ConfigError for a pattern of optim.lr_scales that no parameter fits.
    """
    groups: dict[tuple[bool, float, int], list[nn.Parameter]] = {}
    # One update over many tensors takes those of one mesh only.
    meshes: list[object] = []
    fitting: set[str] = set()
    for name, parameter in model.named_parameters():
        patterns = [pattern for pattern in config.lr_scales if fnmatchcase(name, pattern)]
        fitting.update(patterns)
        scale = config.lr_scales[patterns[-1]] if patterns else 1.0
        parameter.requires_grad_(scale > 0)
        if scale:
            is_decayed = parameter.ndim >= 2 and not name.startswith("embed.")
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            meshes += [mesh] * (mesh not in meshes)
            groups.setdefault((is_decayed, scale, meshes.index(mesh)), []).append(parameter)
    unused = [pattern for pattern in config.lr_scales if pattern not in fitting]
    if unused:
        names = [name for name, _ in model.named_parameters()]
        message = f"fits no parameter; their names are like {names[0]} and {names[len(names) // 2]}"
        raise ConfigError([Violation(f"optim.lr_scales.{pattern}", message) for pattern in unused])
    if not groups:
        raise ConfigError([Violation("optim.lr_scales", "freezes every parameter; leave some above 0")])
    return AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay * is_decayed, "lr_scale": scale}
            for (is_decayed, scale, _), parameters in sorted(
                groups.items(), key=lambda item: item[0], reverse=True
            )
        ],
        config.lr,
        (config.beta1, config.beta2),
        config.eps,
        fused=True,
    )


def gradient_norm(built: Parallel, world: World) -> Tensor:
    """The Euclidean norm of all gradients together, over all ranks, each number counted once; in float64."""
    blocks: dict[int, list[Tensor]] = {}
    for name, parameter in built.model.named_parameters():
        if parameter.grad is not None:
            for block, box in held_boxes(parameter.grad, built.placements[name]):
                blocks.setdefault(box.sharers, []).append(block)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for sharers, parts in blocks.items():
        total += torch.nn.utils.get_total_norm(parts).double().square() / sharers
    return (world.sum(total) / world.axes.dp_replicate.size).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scales all gradients in place so that their global norm is at most `limit`."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            local.mul_(scale)
