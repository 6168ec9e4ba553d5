"""The fields of a run that need no torch to be checked, so that a mistyped key comes back at once."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, model_validator

from conf.compose import Config
from conf.errors import Violation
from data.config import DataConfig
from model.layout import LayoutConfig, expand_layers
from model.moe.config import MoeConfig
from model.shape import ModelConfig, ResidualConfig
from parallel.config.deepep import deepep_violations
from parallel.config.parallel import (
    ParallelConfig,
    compile_violations,
    layout_violations,
    pipeline_violations,
)
from parallel.config.regions import region_violations
from parallel.config.zero import zero_violations
from train.checkpoint.config import CheckpointConfig
from train.track.config import TrackConfig

if TYPE_CHECKING:
    from train.config.run_config import RunConfig

Dtype = Literal["float64", "float32", "bfloat16"]
KernelBackend = Literal["auto", "triton", "reference"]


class PlaceConfig(Config):
    """Where a run writes."""

    dir: str = Field(min_length=1)


class TrainConfig(Config):
    """How long and in what portions."""

    steps: int = Field(ge=1)
    seed: int = Field(ge=0)
    global_batch: int = Field(ge=1)
    micro_batch: int | None = Field(ge=1)
    evaluate_every: int = Field(ge=1)
    evaluate_rows: int = Field(ge=1)
    final_rows: int | None = Field(ge=1)
    max_skipped: int = Field(ge=0)
    start: str | None = Field(min_length=1)
    fresh: list[str]


class SampleConfig(Config):
    """The text sample at the end of a run."""

    prompt: str
    tokens: int = Field(ge=0)
    temperature: float = Field(ge=0)


class AdamwConfig(Config):
    """AdamW."""

    kind: Literal["adamw"]
    lr: float = Field(gt=0)
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip_norm: float = Field(gt=0)
    lr_scales: dict[str, Annotated[float, Field(ge=0)]]


class WsdConfig(Config):
    """Warm-up, stable, decay."""

    kind: Literal["wsd"]
    warmup_steps: int = Field(ge=0)
    decay_fraction: float = Field(gt=0, le=1)
    floor: float = Field(ge=0, le=1)


class CosineConfig(Config):
    """Warm-up, then half a cosine."""

    kind: Literal["cosine"]
    warmup_steps: int = Field(ge=0)
    floor: float = Field(ge=0, le=1)


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

    run: PlaceConfig
    train: TrainConfig
    sample: SampleConfig
    data: DataConfig
    optim: AdamwConfig
    schedule: Annotated[WsdConfig | CosineConfig, Discriminator("kind")]
    precision: PrecisionConfig
    parallel: ParallelConfig
    kernels: KernelsConfig
    checkpoint: CheckpointConfig
    track: TrackConfig
    cluster: ClusterConfig
    plan: PlanConfig
    rehearse: RehearseConfig


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


def run_violations(config: "RunDraft | RunConfig", world_size: int) -> list[Violation]:
    """Everything that types and ranges cannot see: what does not fit together."""
    tokens, experts = config.data.sequence_length, config.moe.num_experts
    found = layout_violations(config.parallel, world_size, experts, tokens)
    found += zero_violations(config.parallel, config.precision.parameters)
    compute = config.precision.compute
    found += deepep_violations(config.parallel, world_size, config.model.width, config.moe, compute)
    mixers = {layer.mixer for layer in expand_layers(config.layout, config.model.depth, config.mixer)}
    mixers |= {config.model.prediction.mixer} if config.model.prediction.depth else set()
    found += region_violations(config.parallel.recompute, mixers)
    found += compile_violations(config.parallel, config.kernels.backends())
    # However the rest is cut, a layout that is possible leaves this many ranks with rows of their own.
    others = config.parallel.pp * config.parallel.cp * config.parallel.tp
    ranks, left = divmod(world_size, others)
    if ranks and not left:
        found += _batch_violations(config, ranks)
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
