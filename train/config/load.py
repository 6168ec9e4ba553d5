"""From overrides to the checked config of a run, without torch until nothing cheap is wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.compose import compose_known, validate
from conf.errors import ConfigError, Violation
from parallel.config.deepep import missing_for_deepep
from parallel.config.zero import missing_violations
from train.config.fields import RunDraft, run_violations

if TYPE_CHECKING:
    from train.config.run_config import RunConfig


def load_config(overrides: Sequence[str], world_size: int | None) -> "RunConfig":
    """The checked config of a run on `world_size` processes, None for those of its cluster.

    Raises ConfigError with all violations.
    """
    tree = compose_known(overrides, RunDraft, started_architecture(overrides))
    found = list(draft_violations(tree, world_size))
    if found and not any(override.lstrip("+").startswith("mixer.") for override in overrides):
        # What the mixers hold then comes from conf/ alone; looking into it would import torch for seconds.
        raise ConfigError(found)
    from train.config.run_config import RunConfig

    try:
        config = validate(RunConfig, tree)
    except ConfigError as error:
        raise ConfigError(list(dict.fromkeys([*error.violations, *found]))) from error
    from parallel.config.parallel import stage_violations, tensor_violations

    found += tensor_violations(config.architecture, config.parallel.tp)
    if not any(violation.key.startswith("parallel.pp") for violation in found):
        found += stage_violations(config.architecture, config.parallel, config.data.sequence_length)
    if found:
        raise ConfigError(found)
    return config


def started_architecture(overrides: Sequence[str]) -> dict[str, Any] | None:
    """The architecture of the weights in train.start, where that is typed.

    Raises ConfigError for a directory that does not hold weights of ours.
    """
    for override in reversed(overrides):
        key, _, value = override.partition("=")
        if key.lstrip("+") == "train.start" and value not in ("null", ""):
            path = Path(value.strip("'\"")) / "config.json"
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise ConfigError([Violation("train.start", f"cannot read {path}: {error}")]) from error
            if not isinstance(found, dict) or not isinstance(found.get("architecture"), dict):
                hint = (
                    f"{path} is not ours; convert it: python -m model.hf import {path.parent} NEW_DIRECTORY"
                )
                raise ConfigError([Violation("train.start", hint)])
            return found["architecture"]
    return None


def draft_violations(tree: dict, world_size: int | None) -> Sequence[Violation]:
    """Everything that is wrong with a composed tree, its mixers left out."""
    try:
        draft = validate(RunDraft, tree)
    except ConfigError as error:
        return error.violations
    if world_size is None:
        return run_violations(draft, draft.cluster.nodes * draft.cluster.gpus_per_node)
    found = run_violations(draft, world_size) + missing_violations(draft.parallel)
    return found + missing_for_deepep(draft.parallel)
