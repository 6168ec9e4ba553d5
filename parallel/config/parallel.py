"""The keys of `parallel`: how many ways each axis of the mesh is cut, and what blocks keep; without torch."""

from typing import Literal

from pydantic import Field

from conf.compose import Config
from parallel.config.degrees import Degrees
from parallel.config.pipeline import PipelinePlan, ScheduleName, fewest_chunks, plan_violations
from parallel.config.regions import region_names
from parallel.config.zero import ZeroConfig


class ParallelConfig(Config):
    """Degrees of the mesh axes. The product of all but ep is the number of processes."""

    data: Literal["fsdp", "zero"]
    zero: ZeroConfig
    pp: int = Field(ge=1)
    pp_schedule: ScheduleName
    pp_chunks: int | None = Field(ge=1)
    pp_layout: str | None
    dp_replicate: int = Field(ge=1)
    dp_shard: int
    cp: int = Field(ge=1)
    tp: int = Field(ge=1)
    ep: int = Field(ge=1)
    ep_dispatch: Literal["all_to_all", "deepep"]
    reshard_after_forward: bool
    prefetch: int = Field(ge=0)
    recompute: str
    offload: Literal["none", "activations"]
    compile: bool
    timeout_seconds: int = Field(ge=1)
    storage_timeout_seconds: int = Field(ge=1)

    def degrees(self, world_size: int) -> Degrees:
        """All degrees, with a dp_shard of -1 replaced by what is left of `world_size`."""
        shard = world_size // self.fixed_degrees() if self.dp_shard == -1 else self.dp_shard
        return Degrees(self.pp, self.dp_replicate, shard, self.cp, self.tp, self.ep)

    def describe(self, world_size: int) -> str:
        """The number of processes as a product of axes, and who cuts the data where it is not FSDP2."""
        line = self.degrees(world_size).describe()
        if self.data != "zero":
            return line
        away = "" if self.zero.offload == "none" else f", {self.zero.offload} in host memory"
        return f"{line}; DeepSpeed ZeRO {self.zero.stage}{away}"

    def plan(self, micro_batches: int) -> PipelinePlan | None:
        """The pipeline of a step with so many micro-batches on a rank, None without one."""
        if self.pp == 1:
            return None
        chunks = self.pp_chunks or fewest_chunks(self.pp_schedule)
        return PipelinePlan(self.pp_schedule, self.pp, chunks, micro_batches)

    def fewest_micro_batches(self) -> int:
        """How many micro-batches of a step the pipeline needs; 1 without one, and where it runs none."""
        plans = (self.plan(count) for count in range(1, 2 * self.pp * (self.pp_chunks or 2) + 1))
        fitting = (plan.micro_batches for plan in plans if plan is not None and not plan_violations(plan))
        return next(fitting, 1)

    def largest_micro_batch(self, rows: int) -> int:
        """The most of `rows` that can go through the model at a time: all, or what its pipeline takes."""
        for count in (count for count in range(1, rows + 1) if rows % count == 0):
            plan = self.plan(count)
            if plan is None or not plan_violations(plan):
                return rows // count
        return rows

    @property
    def recomputed(self) -> frozenset[str]:
        """The regions that `recompute` names."""
        return region_names(self.recompute)

    def fixed_degrees(self) -> int:
        """The product of the degrees other than dp_shard."""
        return self.pp * self.dp_replicate * self.cp * self.tp
