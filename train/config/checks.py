"""Every check of a run's config that types and ranges cannot make, in one order for all commands."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from conf.errors import Violation
from model.layout import expand_layers
from parallel.config.checks import (
    compile_violations,
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
    return found + machine_violations(config.parallel) if is_run_here else found


def model_violations(config: "RunConfig", found: Sequence[Violation]) -> list[Violation]:
    """What keeps ranks from sharing layers, heads and sizes of the model, beside what was found before."""
    from parallel.pipeline.partition import stage_violations

    more = tensor_violations(config.architecture, config.parallel.tp)
    if not any(violation.key.startswith("parallel.pp") for violation in found):
        more += stage_violations(config.architecture, config.parallel, config.data.sequence_length)
    return more


def machine_violations(config: ParallelConfig) -> list[Violation]:
    """What this machine lacks of the packages and devices that the run takes."""
    return missing_for_zero(config) + missing_for_deepep(config)


def draft_violations(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    """Everything that types and ranges cannot see: what does not fit together."""
    tokens, experts = config.data.sequence_length, config.moe.num_experts
    found = parallelism_violations(config.parallel, world_size, experts, tokens)
    found += zero_violations(config.parallel, config.precision.parameters)
    compute = config.precision.compute
    found += deepep_violations(config.parallel, world_size, config.model.width, config.moe, compute)
    mixers = {layer.mixer for layer in expand_layers(config.layout, config.model.depth, config.mixer)}
    mixers |= {config.model.mtp.mixer} if config.model.mtp.depth else set()
    found += region_violations(config.parallel.recompute, mixers)
    found += compile_violations(config.parallel, config.kernels.backends())
    # However the rest is cut, a layout that is possible leaves this many ranks with rows of their own.
    others = config.parallel.pp * config.parallel.cp * config.parallel.tp
    ranks, left = divmod(world_size, others)
    if ranks and not left:
        found += _batch_violations(config, ranks)
    absent = [rank for rank in config.train.profile.ranks if rank >= world_size]
    if absent:
        found.append(
            Violation("train.profile.ranks", f"found {absent[0]} of {world_size} ranks; leave it out")
        )
    if config.data.tokenizer.vocab_size > config.model.vocab_size:
        message = (
            f"{config.model.vocab_size} rows cannot hold the {config.data.tokenizer.vocab_size} pieces of "
            f"data.tokenizer.vocab_size; raise it to at least that"
        )
        found.append(Violation("model.vocab_size", message))
    return found


def _batch_violations(config: "RunDraft | RunConfig", ranks: int) -> list[Violation]:
    """What keeps `ranks` ranks from sharing the rows of a step."""
    found = []
    rows, micro = config.train.global_batch, config.train.micro_batch
    if rows % ranks:
        below = rows - rows % ranks
        legal = f"{below} or {below + ranks}" if below else str(ranks)
        message = f"{rows} sequences cannot be shared evenly by {ranks} data-parallel ranks; use {legal}"
        found.append(Violation("train.global_batch", message))
    elif micro is not None and (rows // ranks) % micro:
        share = rows // ranks
        legal = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        message = f"{micro} does not divide the {share} sequences of a rank; legal values are {legal}"
        found.append(Violation("train.micro_batch", message))
    share = rows // ranks
    if not found:
        found += pipeline_violations(config.parallel, share, micro or share)
    if config.moe.balance_scope == "global" and config.moe.balance_loss and micro not in (None, share):
        message = f"counts the load of the whole batch before backward; found train.micro_batch={micro}"
        hint = f"; set train.micro_batch=null or {share}, or balance_scope=sequence"
        found.append(Violation("moe.balance_scope", message + hint))
    return found
