"""From overrides to the checked config of a run, without torch until nothing cheap is wrong."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.compose import compose_known, composed_value, typed_keys, validate
from conf.errors import ConfigError, Violation
from train.checkpoint.run_files import CONFIG_FILE
from train.config.checks import early_violations, model_violations
from train.config.fields import RunDraft
from train.config.run_names import with_names
from train.config.saved import own_tree, saved_tree

if TYPE_CHECKING:
    from train.config.run_config import RunConfig


def load_config(overrides: Sequence[str], world_size: int | None) -> "RunConfig":
    """The checked config of a run on `world_size` processes, None for those of its cluster.

    Raises ConfigError with all violations.
    """
    return checked(compose_run(overrides), world_size, sees_mixers=names_mixers(overrides))


def compose_run(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed config of a run, unchecked; the weights in train.start bring their architecture.

    Where run.dir is typed and holds a run, what is not typed is as in that run. Raises ConfigError, also
    where the weights are not ours, CheckpointError where the config of that run is damaged without a copy.
    """
    start = composed_value(overrides, "train.start")
    tree = compose_known(overrides, RunDraft, started_architecture(start))
    train = tree.get("train")
    if start is not None and isinstance(train, dict) and train.get("start") != start:
        message = f"{start} brings a model with which it would be {train.get('start')}; give it as plain text"
        raise ConfigError([Violation("train.start", message)])
    own = own_tree(overrides, tree)
    return with_names(tree, overrides) if own is None else with_names(own, None)


def names_mixers(overrides: Sequence[str]) -> bool:
    """Whether a key of a mixer is typed."""
    return any(key.startswith("mixer.") for key in typed_keys(overrides))


def open_run(directory: str) -> "RunConfig":
    """The config that the run in `directory` was started with, with the keys of today.

    Raises ConfigError when there is none, CheckpointError when it is damaged and has no copy.
    """
    saved = run_tree(directory)
    from train.config.run_config import RunConfig

    return validate(RunConfig, saved)


def run_tree(directory: str) -> dict[str, Any]:
    """The same as a plain tree, unchecked. Raises as `open_run` does."""
    saved = saved_tree(Path(directory))
    if saved is None:
        path = Path(directory) / CONFIG_FILE
        message = f"{path}: no such run; give the directory that `python -m train` printed as run.dir"
        raise ConfigError([Violation("run", message)])
    return saved


def checked(tree: dict[str, Any], world_size: int | None, *, sees_mixers: bool) -> "RunConfig":
    """A composed tree as the config of a run on so many processes.

    sees_mixers: their keys were typed, so mixers are looked into even where something else is wrong.
    Raises ConfigError with all violations.
    """
    tree = with_global_batch(tree, world_size)
    found = list(tree_violations(tree, world_size))
    if found and not sees_mixers:
        # What the mixers hold then comes from conf/ alone; looking into it would import torch for seconds.
        raise ConfigError(found)
    from train.config.run_config import RunConfig

    try:
        config = validate(RunConfig, tree)
    except ConfigError as error:
        raise ConfigError(list(dict.fromkeys([*error.violations, *found]))) from error
    found += model_violations(config, found)
    if found:
        raise ConfigError(found)
    return config


def with_global_batch(tree: dict[str, Any], world_size: int | None) -> dict[str, Any]:
    """The tree, its global batch filled in where there is none: two sequences for each data-parallel rank.

    Whatever is of a wrong type stays as it is, for `validate` to name.
    """
    train, parallel, cluster = (tree.get(name) for name in ("train", "parallel", "cluster"))
    if not isinstance(train, dict) or train.get("global_batch", 0) is not None:
        return tree
    ranks = _product(cluster, ("nodes", "gpus_per_node")) if world_size is None else world_size
    batch = 2 * max(1, ranks // _product(parallel, ("pp", "cp", "tp")))
    return {**tree, "train": {**train, "global_batch": batch}}


def _product(tree: Any, names: Sequence[str]) -> int:
    sizes = [tree.get(name) if isinstance(tree, dict) else None for name in names]
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


def started_architecture(start: object) -> dict[str, Any] | None:
    """The architecture of the weights in a directory; None where `start` is not the name of one.

    Raises ConfigError for a directory that does not hold weights of ours.
    """
    if not isinstance(start, str) or not start:
        # Anything else than text and null is for `validate` to name.
        return None
    path = Path(start) / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([Violation("train.start", f"cannot read {path}: {error}")]) from error
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), dict):
        hint = f"{path} is not ours; convert it: python -m model.hf import {path.parent} NEW_DIRECTORY"
        raise ConfigError([Violation("train.start", hint)])
    return found["architecture"]


def tree_violations(tree: dict, world_size: int | None) -> Sequence[Violation]:
    """Everything that is wrong with a composed tree, its mixers left out."""
    try:
        draft = validate(RunDraft, tree)
    except ConfigError as error:
        return error.violations
    ranks = draft.cluster.nodes * draft.cluster.gpus_per_node if world_size is None else world_size
    return early_violations(draft, ranks, is_run_here=world_size is not None)
