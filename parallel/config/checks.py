"""What makes a parallel layout impossible, each with the nearest legal value; without torch."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from conf.errors import Violation
from data.config import SHORTEST_ROW
from parallel.config.degrees import ORDER
from parallel.config.parallel import ParallelConfig
from parallel.config.pipeline import plan_violations

if TYPE_CHECKING:
    from model.config import Architecture


def parallelism_violations(
    config: ParallelConfig, world_size: int, num_experts: int, tokens: int
) -> list[Violation]:
    """Everything that makes the layout impossible on `world_size` processes, with nearest legal values.

    num_experts is that of each mixture, tokens that of a row.
    """
    found = _mesh_violations(config, world_size)
    # However dp_shard, cp and tp come to fit, these are the ranks that experts are shared by.
    ranks, left = divmod(world_size, config.pp * config.dp_replicate)
    if ranks and not left:
        found += _expert_violations(config.ep, num_experts, ranks)
    return found + _row_violations(config, tokens)


def _mesh_violations(config: ParallelConfig, world_size: int) -> list[Violation]:
    found = []
    if config.dp_shard != -1 and config.dp_shard < 1:
        found.append(Violation("parallel.dp_shard", f"must be -1 or at least 1; found {config.dp_shard}"))
    for name in ("tp", "cp", "dp_replicate", "pp"):
        degree = getattr(config, name)
        others = config.fixed_degrees() // degree
        if world_size % others == 0 and (world_size // others) % degree:
            legal = ", ".join(map(str, _divisors(world_size // others)))
            over = f" over {others} of the other axes" if others > 1 else ""
            message = (
                f"{degree} does not divide the {world_size} processes started{over}; legal values are {legal}"
            )
            found.append(Violation(f"parallel.{name}", message))
    if not found and world_size % config.fixed_degrees():
        product = config.fixed_degrees()
        message = (
            f"{_product(config, without_shard=True)} = {product} does not "
            f"divide the {world_size} processes started; lower them, or start a multiple of {product}"
        )
        found.append(Violation("parallel.tp", message))
    product = config.fixed_degrees() * config.dp_shard
    if not found and config.dp_shard != -1 and product != world_size:
        message = (
            f"{_product(config)} = {product}, but "
            f"{world_size} {'process was' if world_size == 1 else 'processes were'} started; "
            f"set it to {world_size // config.fixed_degrees()} or -1, or start {product} processes"
        )
        found.append(Violation("parallel.dp_shard", message))
    return found


def _product(config: ParallelConfig, *, without_shard: bool = False) -> str:
    shown = [
        f"{name} {getattr(config, name)}"
        for name in ORDER
        if getattr(config, name) != 1 and not (without_shard and name == "dp_shard")
    ]
    return " x ".join(shown) or "one rank"


def pipeline_violations(config: ParallelConfig) -> list[Violation]:
    """What makes a pipeline impossible whatever its batch is."""
    plan = config.plan(1)
    if plan is None:
        if config.pp_layout is None:
            return []
        return [Violation("parallel.pp_layout", "says what each stage has; set parallel.pp above 1, or null")]
    found = [violation for violation in plan_violations(plan) if violation.key != "train.micro_batch"]
    if config.prefetch:
        message = f"{config.prefetch} is not for stages of a pipeline, which gather once a step; set it to 0"
        found.append(Violation("parallel.prefetch", message))
    return found


def micro_batch_violations(config: ParallelConfig, rows: int, micro: int | None) -> list[Violation]:
    """What keeps the rows of a rank from going through its pipeline, `micro` at a time; None is what fits."""
    said = _said_of(config, rows // (micro or config.largest_micro_batch(rows)))
    if said is None:
        return []
    legal = ", ".join(str(value) for value in _divisors(rows) if _said_of(config, rows // value) is None)
    if legal:
        return [Violation("train.micro_batch", f"{said}; of {rows} rows per rank legal values are {legal}")]
    message = f"{said}; no share of the {rows} rows per rank does, raise train.global_batch"
    return [Violation("train.global_batch" if micro is None else "train.micro_batch", message)]


def _said_of(config: ParallelConfig, micro_batches: int) -> str | None:
    """What keeps so many micro-batches from going through the pipeline."""
    plan = config.plan(micro_batches)
    found = plan_violations(plan) if plan is not None else []
    return next((violation.message for violation in found if violation.key == "train.micro_batch"), None)


def _expert_violations(degree: int, num_experts: int, ranks: int) -> list[Violation]:
    legal = [each for each in _divisors(ranks) if num_experts % each == 0]
    if degree in legal:
        return []
    message = (
        f"{degree} does not divide the {num_experts} experts and the {ranks} ranks of dp_shard x cp x tp; "
        f"legal values are {', '.join(map(str, legal))}"
    )
    return [Violation("parallel.ep", message)]


def _row_violations(config: ParallelConfig, tokens: int) -> list[Violation]:
    unit = (2 * config.cp if config.cp > 1 else 1) * config.tp
    if tokens % unit == 0:
        return []
    below = tokens - tokens % unit
    legal = " or ".join(str(length) for length in (below, below + unit) if length >= SHORTEST_ROW)
    message = (
        f"{tokens} tokens are not a multiple of {unit}, two chunks for each rank of cp {config.cp} in parts "
        f"for tp {config.tp}; use {legal}"
    )
    return [Violation("data.sequence_length", message)]


def tensor_violations(config: "Architecture", degree: int) -> list[Violation]:
    """What `degree` ranks of the tensor axis cannot share of a model, with degrees that they can."""
    if degree == 1:
        return []
    found = []
    names = dict.fromkeys(layer.mixer for layer in config.layers if layer.mixer in config.mixer)
    mtp = config.model.mtp
    names |= {mtp.mixer: None} if mtp.depth else {}
    for name in names:
        try:
            config.mixer[name].per_rank(degree)
        except ValueError as error:
            found.append(Violation("parallel.tp", f"mixer.{name}: {error}"))
    sizes = {"model.vocab_size": config.model.vocab_size}
    kinds = {layer.ffn for layer in config.layers} | ({mtp.ffn} if mtp.depth else set())
    if kinds & {"dense", "shortcut"}:
        sizes["model.ffn_hidden"] = config.model.ffn_hidden
    if kinds - {"dense", "none"} and config.moe.shared_hidden:
        sizes["moe.shared_hidden"] = config.moe.shared_hidden
    for key, size in sizes.items():
        if size % degree:
            common = math.gcd(size, degree)
            larger = -(-size // degree) * degree
            message = f"{degree} ranks cannot share {key} {size}; {common} can, or make it {larger}"
            found.append(Violation("parallel.tp", message))
    return found


def compile_violations(config: ParallelConfig, backends: Mapping[str, str]) -> list[Violation]:
    """What keeps parts of blocks from being compiled; backends are those of the families of kernels."""
    if not config.compile:
        return []
    from kernels.choose import FUSED

    found = [name for name in FUSED if backends[name] == "triton"]
    message = "parallel.compile=true takes plain torch inside its graphs; found triton; set it to auto"
    violations = [Violation(f"kernels.{name}", message) for name in found]
    if config.pp > 1 and config.pp_schedule not in ("1f1b", "interleaved"):
        # They run through a graph of backward twice, which compiled ones may refuse that reuse their memory.
        message = f"true is not tried beside parallel.pp_schedule={config.pp_schedule}; set that to 1f1b"
        violations.append(Violation("parallel.compile", message))
    return violations


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
