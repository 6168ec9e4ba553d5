"""From overrides to the checked config of a run, without torch until nothing cheap is wrong."""

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from conf.compose import compose_known, composed_value, valid_parts, validate
from conf.errors import ConfigError, Violation
from conf.user_files import Given, read_given
from parallel.config.parallel import ParallelConfig
from train.checkpoint.run_files import CONFIG_FILE
from train.config.checks import early_violations, mixer_key_violations, model_violations
from train.config.dataset import dataset_values
from train.config.fields import RunDraft
from train.config.run_names import with_names
from train.config.saved import own_tree, refuse_run_of_file, saved_tree, saved_values

if TYPE_CHECKING:
    from train.config.run_config import RunConfig


def load_config(
    overrides: Sequence[str], world_size: int | None, *, starts: bool | None = None
) -> "RunConfig":
    """The checked config of a run on `world_size` processes, None for those of its cluster.

    starts: a run begins from it, or is to be shown to be able to; None is where world_size is given. Raises
    ConfigError with all violations.
    """
    given = read_run(overrides)
    with given.naming_file():
        tree = compose_run(given)
        if world_size is not None if starts is None else starts:
            refuse_run_of_file(given, tree)
        return checked(tree, world_size, mixer_keys(given))


def read_run(overrides: Sequence[str]) -> Given:
    """The overrides of a run with the files of the user's own. Raises ConfigError, CheckpointError."""
    return read_given(overrides, read_whole=saved_values)


def compose_run(given: Given) -> dict[str, Any]:
    """The composed config of a run, unchecked; the weights in train.start bring their architecture.

    A dataset that is typed brings its corpora and its tokenizer. Where run.dir is typed and holds a run, what
    is not typed is as in that run. Raises ConfigError, also where the weights are not ours, CheckpointError
    where the config of that run is damaged without a copy, DataError where the dataset is damaged.
    """
    start = composed_value(given, "train.start")
    tree = compose_known(
        given, RunDraft, started_architecture(start), dataset_values(given, start is not None)
    )
    train = tree.get("train")
    if start is not None and isinstance(train, dict) and train.get("start") != start:
        message = f"{start} brings a model with which it would be {train.get('start')}; give it as plain text"
        raise ConfigError([Violation("train.start", message)])
    own = own_tree(given, tree)
    return with_names(tree, given) if own is None else with_names(own, None)


def mixer_keys(given: Given) -> list[str]:
    """The keys of mixers that are typed, or stand in a file of the user's that has a part of all keys."""
    is_whole = given.file is not None and given.file.is_whole
    keys = given.typed_keys() if is_whole else given.all_keys()
    return [key for key in keys if key.startswith("mixer.")]


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


def checked(tree: dict[str, Any], world_size: int | None, mixer_keys: Collection[str]) -> "RunConfig":
    """A composed tree as the config of a run on so many processes.

    mixer_keys are those that were typed: with them mixers are looked into even where something else is wrong,
    unless none of them is a key. Raises ConfigError with all violations.
    """
    tree = with_global_batch(tree, world_size)
    found = list(tree_violations(tree, world_size))
    unknown = mixer_key_violations(tree.get("mixer")) if mixer_keys else []
    if (found or unknown) and {*mixer_keys} <= {violation.key for violation in unknown}:
        # What else the mixers hold comes from conf/ alone; looking into it would import torch for seconds.
        raise ConfigError([*unknown, *found])
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

    More where a micro-batch that is given, or the micro-batches of a pipeline, take more.

    Whatever is of a wrong type stays as it is, for `validate` to name.
    """
    train, parallel, cluster = (tree.get(name) for name in ("train", "parallel", "cluster"))
    if not isinstance(train, dict) or train.get("global_batch", 0) is not None:
        return tree
    ranks = _product(cluster, ("nodes", "gpus_per_node")) if world_size is None else world_size
    shares = max(1, ranks // _product(parallel, ("pp", "cp", "tp")))
    batch = shares * _rows(parallel, train.get("micro_batch"))
    return {**tree, "train": {**train, "global_batch": batch}}


def _rows(parallel: object, micro: object) -> int:
    """The fewest sequences of a rank, 2 at least, that go through its pipeline `micro` at a time."""
    at_once = micro if isinstance(micro, int) and micro > 0 else 1
    try:
        count = ParallelConfig.model_validate(parallel).fewest_micro_batches()
    except ValidationError:
        count = 1
    return at_once * max(count, -(-2 // at_once))


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


def tree_violations(tree: dict, world_size: int | None) -> list[Violation]:
    """Everything that is wrong with a composed tree, its mixers left out."""
    found = list[Violation]()
    try:
        draft = validate(RunDraft, tree)
    except ConfigError as error:
        draft, found = valid_parts(RunDraft, tree), list(error.violations)
    if world_size is None and not hasattr(draft, "cluster"):
        return found
    ranks = draft.cluster.nodes * draft.cluster.gpus_per_node if world_size is None else world_size
    return found + early_violations(draft, ranks, is_run_here=world_size is not None)
