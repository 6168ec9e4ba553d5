"""What DeepSpeed cannot do of what a run may ask for, and what this machine lacks; without DeepSpeed."""

from importlib.metadata import PackageNotFoundError, version

from conf.errors import Violation
from parallel.config.parallel import ParallelConfig
from parallel.config.zero import RELEASE


def zero_violations(config: ParallelConfig, parameters: str) -> list[Violation]:
    """What keeps DeepSpeed from training a layout with parameters of this dtype, each with a legal value."""
    zero = config.zero
    if config.data != "zero":
        if zero.offload == "none":
            return []
        message = f"{zero.offload} is DeepSpeed's; set it to none, or set parallel.data=zero"
        return [Violation("parallel.zero.offload", message)]
    found = [
        Violation(f"parallel.{name}", f"parallel.data=zero cuts rows alone; found {degree}; set it to 1")
        for name in ("pp", "dp_replicate", "cp", "tp", "ep")
        if (degree := getattr(config, name)) != 1
    ]
    if zero.offload == "parameters" and zero.stage < 3:
        message = f"parameters needs parallel.zero.stage=3; found {zero.stage}; set offload to optimizer"
        found.append(Violation("parallel.zero.offload", message))
    if zero.stage == 3 and config.recomputed:
        message = "is not tried beside parallel.zero.stage=3; set it to none, or stage to 2"
        found.append(Violation("parallel.recompute", message))
    if config.offload == "activations":
        found.append(Violation("parallel.offload", "activations is not tried beside zero; set it to none"))
    if config.prefetch:
        found.append(Violation("parallel.prefetch", f"{config.prefetch} is FSDP2's; set it to 0"))
    if config.compile:
        found.append(Violation("parallel.compile", "true is not tried beside zero; set it to false"))
    if parameters != "float32":
        message = f"DeepSpeed keeps float32 alone; found {parameters}; set precision=fp32 or precision=bf16"
        found.append(Violation("precision.parameters", message))
    return found


def missing_for_zero(config: ParallelConfig) -> list[Violation]:
    """What this machine lacks to run `parallel.data`."""
    if config.data != "zero":
        return []
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = "none"
    if found == RELEASE:
        return []
    message = f"zero needs DeepSpeed {RELEASE}; found {found}; pip install deepspeed=={RELEASE}, or set fsdp"
    return [Violation("parallel.data", message)]
