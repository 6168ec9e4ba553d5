"""First values of all parameters: a pure function of the seed and the parameter's name.

So they do not depend on the order of construction, on the layers beside, or on how a model is spread.
"""

import hashlib

import torch
from torch import Tensor, nn

from model.linear import Initial


def initial_values(model: nn.Module) -> dict[str, Initial]:
    """How each parameter starts, by its full name. Read it before a model is sharded."""
    found = {}
    for prefix, module in model.named_modules():
        for name, initial in getattr(module, "initial", {}).items():
            found[f"{prefix}.{name}" if prefix else name] = initial
    missing = [name for name, _ in model.named_parameters() if name not in found]
    assert not missing, f"parameters without an initial value: {missing}"
    return found


def float32_names(model: nn.Module) -> set[str]:
    """The parameters that no cast narrows, as they declare, and the buffers, which move by small steps."""
    names = {name for name, initial in initial_values(model).items() if initial.is_float32}
    return names | {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def sample(name: str, initial: Initial, shape: torch.Size, seed: int) -> Tensor:
    """The first value of one parameter, float32, on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return initial.sample(shape, generator)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Gives every parameter of a plain model its first value. Mutates the parameters."""
    initials = initial_values(model)
    for name, parameter in model.named_parameters():
        parameter.copy_(sample(name, initials[name], parameter.shape, seed))
