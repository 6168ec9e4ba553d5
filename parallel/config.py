"""How many ways each axis of the mesh is cut, and the check that the layout is possible."""

from typing import Literal

from pydantic import Field

from conf.compose import Config
from conf.errors import Violation
from parallel.degrees import Degrees


class ParallelConfig(Config):
    """Degrees of the mesh axes. The product of all but ep is the number of processes."""

    data: Literal["fsdp"]
    dp_replicate: int = Field(ge=1)
    dp_shard: int
    ep: int = Field(ge=1)
    reshard_after_forward: bool
    timeout_seconds: int = Field(ge=1)

    def degrees(self, world_size: int) -> Degrees:
        """All degrees, with a dp_shard of -1 replaced by what is left of `world_size`."""
        shard = world_size // self.dp_replicate if self.dp_shard == -1 else self.dp_shard
        return Degrees(dp_replicate=self.dp_replicate, dp_shard=shard, ep=self.ep)


def layout_violations(config: ParallelConfig, world_size: int, num_experts: int) -> list[Violation]:
    """Everything that makes the layout impossible on `world_size` processes, with nearest legal values.

    num_experts is that of each mixture, 0 without any.
    """
    found = _data_violations(config, world_size)
    return found or _expert_violations(config, world_size, num_experts)


def _data_violations(config: ParallelConfig, world_size: int) -> list[Violation]:
    if config.dp_shard != -1 and config.dp_shard < 1:
        return [Violation("parallel.dp_shard", f"must be -1 or at least 1; found {config.dp_shard}")]
    if world_size % config.dp_replicate:
        legal = ", ".join(map(str, _divisors(world_size)))
        message = (
            f"{config.dp_replicate} does not divide the {world_size} processes started; "
            f"legal values are {legal}"
        )
        return [Violation("parallel.dp_replicate", message)]
    if config.dp_shard != -1 and config.dp_replicate * config.dp_shard != world_size:
        product = config.dp_replicate * config.dp_shard
        message = (
            f"dp_replicate x dp_shard = {config.dp_replicate} x {config.dp_shard} = {product}, but "
            f"{world_size} {'process was' if world_size == 1 else 'processes were'} started; "
            f"set it to {world_size // config.dp_replicate} or -1, or start {product} processes"
        )
        return [Violation("parallel.dp_shard", message)]
    return []


def _expert_violations(config: ParallelConfig, world_size: int, num_experts: int) -> list[Violation]:
    ranks = config.degrees(world_size).dp_shard
    legal = [degree for degree in _divisors(ranks) if num_experts % degree == 0]
    if config.ep in legal:
        return []
    message = (
        f"{config.ep} does not divide the {num_experts} experts and the {ranks} ranks of dp_shard; "
        f"legal values are {', '.join(map(str, legal))}"
    )
    return [Violation("parallel.ep", message)]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
