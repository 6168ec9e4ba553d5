"""The config of a run for commands that read its weights: which checkpoint, and the layout to read it in.

Nothing goes backward, so there is no optimizer, no DeepSpeed and nothing that saves memory for backward.
torch is not imported before what was typed is checked.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.compose import parse_values, validate
from conf.errors import ConfigError, Violation
from conf.tree import set_keys
from parallel.config.checks import parallelism_violations, pipeline_violations
from parallel.config.deepep import deepep_violations, missing_for_deepep
from train.checkpoint.entries import list_entries, refuse_unknown_step
from train.checkpoint.run_files import CHECKPOINTS
from train.config.fields import RunDraft
from train.config.load import run_tree

if TYPE_CHECKING:
    from train.config.run_config import RunConfig

GROUP = "parallel."
# What is about training alone, as reading has it.
_READING = {"data": "fsdp", "recompute": "none", "offload": "none", "compile": False}
# What fits any number of processes, beside an ep that does.
_FITTING = {"pp": 1, "pp_layout": None, "dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1, "ep": 1}


def split_layout(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command, and those among them that are keys of the group `parallel`."""
    layout = [argument for argument in arguments if argument.startswith(GROUP)]
    return [argument for argument in arguments if not argument.startswith(GROUP)], layout


def open_to_read(directory: str, step: int | None, layout: Sequence[str], world_size: int) -> "RunConfig":
    """The config of the run in a directory, in the layout in which so many processes read its weights.

    That is the run's own with the keys of `layout` in place of its; one process has no layout but these.

    Raises ConfigError without a run, for a step that it has no checkpoint of, and for a layout that does not
    fit, CheckpointError where its config is damaged without a copy.
    """
    tree = run_tree(directory)
    if step is not None:
        checkpoints = Path(directory) / CHECKPOINTS
        refuse_unknown_step(checkpoints, step, list_entries(checkpoints))
    typed = parse_values(layout)
    _set_layout(tree, typed, world_size)
    draft, keys = validate(RunDraft, tree), [key for key, _ in typed]
    _refuse(_early_violations(draft, world_size), keys, draft, world_size)
    from train.config.run_config import RunConfig

    config = validate(RunConfig, tree)
    _refuse(_late_violations(config), keys, draft, world_size)
    return config


def _set_layout(tree: dict[str, Any], typed: Sequence[tuple[str, Any]], world_size: int) -> None:
    """Gives a run's tree the layout to read it in. Mutates the tree. Raises ConfigError."""
    keys = {key.removeprefix(GROUP) for key, _ in typed}
    useless = [key for key in keys if key.split(".")[0] in {*_READING, "zero"}]
    if useless:
        message = "is about training; weights are read and run forward alone, so leave it out"
        raise ConfigError([Violation(GROUP + key, message) for key in sorted(useless)])
    layout = tree["parallel"] | _READING
    if world_size == 1:
        layout |= _FITTING
    elif "pp" in keys:
        layout["pp_layout"] = None
    if violations := set_keys(tree | {"parallel": layout}, typed):
        raise ConfigError(violations)
    # A token goes nowhere else, and stages gather once.
    if layout["ep"] == 1 and "ep_dispatch" not in keys:
        layout["ep_dispatch"] = "all_to_all"
    if layout["pp"] != 1 and "prefetch" not in keys:
        layout["prefetch"] = 0
    tree["parallel"] = layout


def _early_violations(draft: RunDraft, world_size: int) -> list[Violation]:
    parallel, moe = draft.parallel, draft.moe
    found = parallelism_violations(parallel, world_size, moe.num_experts, draft.data.sequence_length)
    compute = draft.precision.compute
    found += deepep_violations(parallel, world_size, draft.model.width, moe, compute)
    # Held-out windows and samples are no step of a schedule: any number of rows will do.
    return found + pipeline_violations(parallel) + missing_for_deepep(parallel)


def _late_violations(config: "RunConfig") -> list[Violation]:
    from parallel.config.checks import tensor_violations
    from parallel.pipeline.partition import stage_violations

    found = tensor_violations(config.architecture, config.parallel.tp)
    return found + stage_violations(config.architecture, config.parallel, config.data.sequence_length)


def _refuse(found: Sequence[Violation], typed: Sequence[str], draft: RunDraft, world_size: int) -> None:
    """Raises ConfigError for violations: those of typed keys as they are, else the keys that would fit."""
    if not found:
        return
    named = [violation for violation in found if violation.key in typed]
    if named:
        raise ConfigError(named)
    now = draft.parallel.model_dump()
    fitting = _fitting(now, draft.moe.num_experts, world_size)
    changes = (name for name, value in fitting.items() if value != now[name])
    keys = " ".join(f"{GROUP}{name}={_written(fitting[name])}" for name in changes)
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    first = found[0]
    message = f"does not fit the {processes} started ({first.key}: {first.message}); give {keys}"
    raise ConfigError([Violation("parallel", f"the layout of the run {message}")])


def _fitting(layout: Mapping[str, Any], num_experts: int, world_size: int) -> dict[str, Any]:
    """A layout for so many processes that any model fits: weights sharded, experts spread if they were."""
    ep = math.gcd(num_experts, world_size) if layout["ep"] > 1 else 1
    return {**layout, **_FITTING, "ep": ep, "ep_dispatch": "all_to_all"}


def _written(value: Any) -> str:
    return "null" if value is None else str(value)
