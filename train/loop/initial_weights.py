"""Weights that a run begins from, instead of its first values."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from conf.errors import CheckpointError
from conf.names import shortened
from data.loader import Loader
from data.tokenizer.files import has_tokenizer, read_files, tokenizer_digest
from model.hf.files import HubDirectory
from parallel.apply import Parallel
from train.checkpoint.foreign_ids import Ids, compare_ids
from train.config.run_config import RunConfig


def begin(built: Parallel, config: RunConfig, loader: Loader) -> list[str]:
    """Takes over the weights of train.start; gives the lines to print. Mutates the model.

    Raises CheckpointError for weights that do not fit the model, ConfigError for those of another tokenizer
    than the data, both before anything is copied.
    """
    assert config.train.start is not None, "a run that begins from weights"
    hub = HubDirectory(Path(config.train.start))
    line = compare_ids(
        Ids(config.train.start, hub.tokenizer_digest or digest_beside(hub.path)),
        Ids(config.data.directory, loader.card.tokenizer.digest),
        "train.start",
        "prepare the data with the tokenizer of the weights (data.tokenizer.model), or set "
        "train.foreign_ids=true where it is meant, as for a new vocabulary",
        are_meant=config.train.foreign_ids,
    )
    fresh = start_from(built, hub, config.train.fresh)
    began = f"began from {config.train.start}, {len(fresh)} parameters from their first values"
    return [said for said in (hub.passed_over(), line, began) if said]


def digest_beside(path: Path) -> str | None:
    """The digest of the tokenizer that lies beside weights of the hub; None without one. Raises DataError."""
    return tokenizer_digest(read_files(path), str(path)) if has_tokenizer(path) else None


@torch.no_grad()
def start_from(built: Parallel, hub: HubDirectory, fresh: Sequence[str]) -> list[str]:
    """Copies the weights in a directory into a model in any layout; gives the names that it lacks.

    Only names that a pattern of `fresh` fits may be missing. Each process reads one tensor at a time and
    keeps its part. Mutates the model.

    Raises CheckpointError before anything is copied.
    """
    forms, state, shard_maps = hub.forms(), built.state(), built.shard_maps
    kept = {name for name in built.names - forms.keys() if any(fnmatchcase(name, like) for like in fresh)}
    wholes = {name: shard_maps.get(name, tensor) for name, tensor in state.items()}
    shapes = {name: tuple(whole.shape) for name, whole in wholes.items() if name in forms}
    problems = {
        "missing": built.names - forms.keys() - kept,
        "unexpected": forms.keys() - built.names,
        "misshaped": [
            f"{name} (found {list(forms[name][0])}, expected {list(shape)})"
            for name, shape in shapes.items()
            if forms[name][0] != shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what} tensors: {shortened(names)}" for what, names in problems.items() if names)
        raise CheckpointError(
            f"{hub.path}: does not fit this model: {found}; leave model= and layout= out to train the model "
            "of the weights, or name new parameters in train.fresh"
        )
    for name, tensor in hub.tensors():
        if name in shard_maps:
            built.fill(name, state[name], tensor)
        elif name in state:
            state[name].copy_(tensor)
    for first, last in built.tied_copies():
        last.copy_(first)
    return sorted(kept)
