"""Weights that a run begins from, instead of its first values."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from conf.errors import CheckpointError
from model.hf.files import HubDirectory, shortened


@torch.no_grad()
def start_from(model: nn.Module, directory: Path, fresh: Sequence[str]) -> list[str]:
    """Copies the weights in `directory` into a model, sharded or not; gives the names that it lacks.

    Only names that a pattern of `fresh` fits may be missing. Each process reads one tensor at a time and
    keeps its part. Mutates the model.

    Raises CheckpointError before anything is copied.
    """
    hub = HubDirectory(directory)
    forms, state = hub.forms(), model.state_dict()
    kept = {name for name in state.keys() - forms.keys() if any(fnmatchcase(name, like) for like in fresh)}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name in forms}
    problems = {
        "missing": state.keys() - forms.keys() - kept,
        "unexpected": forms.keys() - state.keys(),
        "misshaped": [
            f"{name} (found {list(forms[name][0])}, expected {list(shape)})"
            for name, shape in shapes.items()
            if forms[name][0] != shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what} tensors: {shortened(names)}" for what, names in problems.items() if names)
        raise CheckpointError(
            f"{directory}: does not fit this model: {found}; leave model= and layout= out to train the model "
            "of the weights, or name new parameters in train.fresh"
        )
    for name, tensor in hub.tensors():
        _copy(state[name], tensor)
    return sorted(kept)


def _copy(target: Tensor, value: Tensor) -> None:
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        part = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(value)
