"""How many ways each axis of the mesh is cut, and the check that the layout is possible."""

from typing import Literal

from pydantic import Field

from conf.compose import Config
from conf.errors import Violation


class ParallelConfig(Config):
    """Degrees of the mesh axes. Their product is the number of processes."""

    data: Literal["fsdp"]
    dp_replicate: int = Field(ge=1)
    dp_shard: int
    reshard_after_forward: bool
    timeout_seconds: int = Field(ge=1)

    def degrees(self, world_size: int) -> tuple[int, int]:
        """dp_replicate and dp_shard, with -1 replaced by what is left of `world_size`."""
        shard = world_size // self.dp_replicate if self.dp_shard == -1 else self.dp_shard
        return self.dp_replicate, shard


def layout_violations(config: ParallelConfig, world_size: int) -> list[Violation]:
    """Everything that makes the layout impossible on `world_size` processes, with nearest legal values."""
    found = []
    if config.dp_shard != -1 and config.dp_shard < 1:
        message = f"must be -1 or at least 1; found {config.dp_shard}"
        found.append(Violation("parallel.dp_shard", message))
        return found
    if world_size % config.dp_replicate:
        legal = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        message = (
            f"{config.dp_replicate} does not divide the {world_size} processes started; "
            f"legal values are {', '.join(legal)}"
        )
        found.append(Violation("parallel.dp_replicate", message))
    elif config.dp_shard != -1 and config.dp_replicate * config.dp_shard != world_size:
        message = (
            f"dp_replicate x dp_shard = {config.dp_replicate} x {config.dp_shard} = "
            f"{config.dp_replicate * config.dp_shard}, but {world_size} "
            f"{'process was' if world_size == 1 else 'processes were'} started; "
            f"set it to {world_size // config.dp_replicate} or -1, or start "
            f"{config.dp_replicate * config.dp_shard} processes"
        )
        found.append(Violation("parallel.dp_shard", message))
    return found
