"""The fields of a run that need no torch to be checked, so that a mistyped key comes back at once."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from conf.compose import Config
from data.config import DataConfig
from model.layout import LayoutConfig, expand_layers
from model.moe.config import MoeConfig
from model.shape import ModelConfig, ResidualConfig
from parallel.config.parallel import ParallelConfig
from train.checkpoint.config import CheckpointConfig
from train.config.slurm import SlurmConfig
from train.optim.optimizer import OptimizerConfig, optimizer_type
from train.optim.schedule import ScheduleConfig, schedule_type
from train.track.config import TrackConfig

if TYPE_CHECKING:
    OptimizerEntry = OptimizerConfig
    ScheduleEntry = ScheduleConfig
else:
    OptimizerEntry = optimizer_type()
    ScheduleEntry = schedule_type()

Dtype = Literal["float64", "float32", "bfloat16"]
KernelBackend = Literal["auto", "triton", "reference"]


class RunDirConfig(Config):
    """Where a run writes."""

    # What a shell, a log line and an override can hold.
    dir: str = Field(pattern=r"^[^\x00-\x1f\x7f$\\]+$")
    name: str = Field(min_length=1)


class ProfileConfig(Config):
    """Which steps the profiler records."""

    first_step: int | None = Field(ge=1)
    steps: int = Field(ge=1)
    ranks: list[Annotated[int, Field(ge=0)]]


class TrainConfig(Config):
    """How long and in what portions."""

    steps: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**63)
    global_batch: int = Field(ge=1)
    micro_batch: int | None = Field(ge=1)
    evaluate_every: int = Field(ge=1)
    evaluate_rows: int = Field(ge=1)
    final_rows: int | None = Field(ge=1)
    max_skipped: int = Field(ge=0)
    vocab_multiple: int = Field(ge=1)
    start: str | None = Field(min_length=1)
    fresh: list[str]
    foreign_ids: bool
    gc_every: int | None = Field(ge=1)
    profile: ProfileConfig


class SampleConfig(Config):
    """Text samples, on the way and at the end of a run."""

    prompt: str
    tokens: int = Field(ge=0)
    temperature: float = Field(ge=0)
    every: int | None = Field(ge=1)


class PrecisionConfig(Config):
    """Dtypes of computation and of what the optimizer keeps."""

    compute: Dtype
    parameters: Dtype

    @model_validator(mode="after")
    def _fits(self) -> "PrecisionConfig":
        if self.parameters == "bfloat16":
            raise ValueError("parameters must be float32 or float64; bfloat16 ones lose small updates")
        if self.compute == "float64" and self.parameters != "float64":
            raise ValueError("compute float64 needs parameters float64")
        return self


class ClusterConfig(Config):
    """What the run runs on; plans and shares of peak are computed from it."""

    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1)
    device: Literal["auto", "cpu", "cuda"]
    memory_gib: float | None = Field(gt=0)
    peak_tflops: float | None = Field(gt=0)


class KernelsConfig(Config):
    """How each family of kernels runs, and what a wrong one does to a run."""

    check: Literal["stop", "fall_back", "off"]
    activation: KernelBackend
    attention: KernelBackend
    block_attention: KernelBackend
    block_selection: KernelBackend
    compress: KernelBackend
    compressed_attention: KernelBackend
    convolution: KernelBackend
    cross_entropy: KernelBackend
    delta_rule: KernelBackend
    experts: KernelBackend
    indexer: KernelBackend
    linear_attention: KernelBackend
    norm: KernelBackend
    rotary: KernelBackend
    selected_attention: KernelBackend
    sinkhorn: KernelBackend

    def backends(self) -> dict[str, KernelBackend]:
        """The backend of every family."""
        return {name: backend for name, backend in self if name != "check"}


class PlanConfig(Config):
    """What `python -m train.plan` prints."""

    format: Literal["table", "json"]
    context: int | None = Field(ge=1)


class RehearseConfig(Config):
    """What `python -m train.rehearse` plays and prints."""

    rank: int | None = Field(ge=0)
    format: Literal["table", "json"]


class RunFields(Config):
    """All of a run but its model."""

    run: RunDirConfig
    train: TrainConfig
    sample: SampleConfig
    data: DataConfig
    optim: OptimizerEntry
    schedule: ScheduleEntry
    precision: PrecisionConfig
    parallel: ParallelConfig
    kernels: KernelsConfig
    checkpoint: CheckpointConfig
    track: TrackConfig
    cluster: ClusterConfig
    plan: PlanConfig
    rehearse: RehearseConfig
    slurm: SlurmConfig = SlurmConfig()


class RunDraft(RunFields):
    """A run whose mixers are not looked into yet."""

    model: ModelConfig
    layout: LayoutConfig
    mixer: dict[str, dict[str, Any]]
    moe: MoeConfig
    residual: ResidualConfig

    @model_validator(mode="after")
    def _fits(self) -> "RunDraft":
        expand_layers(self.layout, self.model.depth, self.mixer)
        return self
