"""Every check of a run's config that types and ranges cannot make, in one order for all commands."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from conf.compose import unknown_key
from conf.errors import Violation
from conf.groups import option_files
from conf.keys import file_keys
from data.config import READ
from model.layout import expand_layers
from parallel.config.checks import (
    compile_violations,
    micro_batch_violations,
    parallelism_violations,
    pipeline_violations,
    tensor_violations,
)
from parallel.config.deepep import deepep_violations, missing_for_deepep
from parallel.config.parallel import ParallelConfig
from parallel.config.regions import region_violations
from parallel.config.zero_checks import missing_for_zero, zero_violations
from train.config.fields import RunDraft

if TYPE_CHECKING:
    from train.config.run_config import RunConfig


def early_violations(
    config: "RunDraft | RunConfig", world_size: int, *, is_run_here: bool
) -> list[Violation]:
    """What shows before mixers are looked into, which imports torch."""
    found = draft_violations(config, world_size)
    is_read = is_run_here and hasattr(config, "parallel")
    return found + machine_violations(config.parallel) if is_read else found


def model_violations(config: "RunConfig", found: Sequence[Violation]) -> list[Violation]:
    """What keeps ranks from sharing layers, heads and sizes of the model, beside what was found before."""
    from parallel.pipeline.partition import stage_violations

    more = tensor_violations(config.architecture, config.parallel.tp)
    if not any(violation.key.startswith("parallel.pp") for violation in found):
        more += stage_violations(config.architecture, config.parallel, config.data.sequence_length)
    return more


def mixer_key_violations(mixers: object) -> list[Violation]:
    """Every key that a mixer of its kind does not have, by the files of conf/, which have all; without torch.

    mixers is that part of a composed tree.
    """
    files, known, unknown = option_files("mixer"), list[str](), list[str]()
    for name, node in mixers.items() if isinstance(mixers, dict) else ():
        kind = node.get("kind", name) if isinstance(node, dict) else None
        if kind in files:
            keys = [key.name.removeprefix(f"mixer.{kind}.") for key in file_keys(files[kind])]
            known += [f"mixer.{name}.{key}" for key in keys]
            unknown += [f"mixer.{name}.{key}" for key in node if key not in (*keys, "kind")]
    return [Violation(key, unknown_key(key, known)) for key in unknown]


def machine_violations(config: ParallelConfig) -> list[Violation]:
    """What this machine lacks of the packages and devices that the run takes."""
    return missing_for_zero(config) + missing_for_deepep(config)


def draft_violations(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    """Everything that types and ranges cannot see: what does not fit together."""
    return [
        violation
        for check, parts in _CHECKS.items()
        if all(hasattr(config, part) for part in parts)
        for violation in check(config, world_size)
    ]


def _layout(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    tokens, experts = config.data.sequence_length, config.moe.num_experts
    return parallelism_violations(config.parallel, world_size, experts, tokens)


def _zero(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    return zero_violations(config.parallel, config.precision.parameters)


def _deepep(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    compute = config.precision.compute
    return deepep_violations(config.parallel, world_size, config.model.width, config.moe, compute)


def _regions(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    try:
        mixers = {layer.mixer for layer in expand_layers(config.layout, config.model.depth, config.mixer)}
    except ValueError as error:
        # The parts of a config of which another one is wrong have not been held against each other yet.
        key, _, message = str(error).partition(": ")
        return [Violation(key, message)]
    mixers |= {config.model.mtp.mixer} if config.model.mtp.depth else set()
    return region_violations(config.parallel.recompute, mixers)


def _compiled(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    return compile_violations(config.parallel, config.kernels.backends())


def _pipeline(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    return pipeline_violations(config.parallel)


def _profile(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    absent = [rank for rank in config.train.profile.ranks if rank >= world_size]
    if not absent:
        return []
    return [Violation("train.profile.ranks", f"found {absent[0]} of {world_size} ranks; leave it out")]


def _vocabulary(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    asked = config.data.tokenizer
    # The size of a tokenizer that is given is known once it was read, which the dataset's card says.
    is_unknown = asked.model is not None and not asked.model.startswith(READ)
    if is_unknown or asked.vocab_size <= config.model.vocab_size:
        return []
    message = (
        f"{config.model.vocab_size} rows cannot hold the {asked.vocab_size} pieces of "
        f"data.tokenizer.vocab_size; raise it to at least that"
    )
    return [Violation("model.vocab_size", message)]


def _batch(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    """What keeps ranks from sharing the rows of a step."""
    # However the rest is cut, a layout that is possible leaves this many ranks with rows of their own.
    ranks, left = divmod(world_size, config.parallel.pp * config.parallel.cp * config.parallel.tp)
    if not ranks or left:
        return []
    found = []
    rows, micro = config.train.global_batch, config.train.micro_batch
    share = rows // ranks
    if rows % ranks:
        below = rows - rows % ranks
        legal = f"{below} or {below + ranks}" if below else str(ranks)
        message = f"{rows} sequences cannot be shared evenly by {ranks} data-parallel ranks; use {legal}"
        found.append(Violation("train.global_batch", message))
    elif micro is not None and share % micro:
        legal = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        message = f"{micro} does not divide the {share} sequences of a rank; legal values are {legal}"
        found.append(Violation("train.micro_batch", message))
    if not found:
        found += micro_batch_violations(config.parallel, share, micro)
    taken = micro or config.parallel.largest_micro_batch(share)
    if config.moe.balance_scope == "global" and config.moe.balance_loss and taken not in (0, share):
        message = f"counts the load of the whole batch before backward; found train.micro_batch={taken}"
        fix = f"set train.micro_batch=null or {share}, or " if micro is not None else "set "
        found.append(Violation("moe.balance_scope", f"{message}; {fix}balance_scope=sequence"))
    return found


Check = Callable[["RunDraft | RunConfig", int], list[Violation]]
# Each with the parts of the config that it reads: where one is wrong by itself, the others are still checked.
_CHECKS: dict[Check, tuple[str, ...]] = {
    _layout: ("parallel", "data", "moe"),
    _zero: ("parallel", "precision"),
    _deepep: ("parallel", "precision", "model", "moe"),
    _regions: ("parallel", "layout", "model", "mixer"),
    _compiled: ("parallel", "kernels"),
    _pipeline: ("parallel",),
    _batch: ("parallel", "train", "moe"),
    _profile: ("train",),
    _vocabulary: ("data", "model"),
}
