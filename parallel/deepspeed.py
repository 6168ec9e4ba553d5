"""Data parallelism by DeepSpeed: ZeRO cuts optimizer state, gradients and weights, the rest is as ever.

Weights, gradients and moments are float32; the model narrows weights where it uses them, as on one process,
so routers and decays keep their precision. What a rank holds are runs of numbers of whole parameters; they
are stored under the names of the whole model, like the cuts of FSDP2.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from model.language_model import LanguageModel, Losses
from parallel.apply import Parallel
from parallel.config.zero import BUCKET, ZeroConfig
from parallel.mesh.world import World
from parallel.micro_batches import Denominators, MicroBatch, Pick, added, objective_of, undivided
from parallel.shard.shard_view import GlobalShardView

# The optimizer's state of a tensor before its first update.
InitialState: TypeAlias = Callable[[Tensor], dict[str, Tensor]]


class FlatSlice(NamedTuple):
    """What this rank holds of a parameter or a moment; start is the flat index of its first number."""

    numbers: Float[Tensor, "N"]
    start: int


class Slot(NamedTuple):
    """Where a parameter's numbers are: in which partition, from where, how many; start as of FlatSlice."""

    partition: Tensor
    offset: int
    length: int
    start: int


class Objective(nn.Module):
    """The model with its losses or logits as forward, the only thing that DeepSpeed's engine runs."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, asked: Denominators | Pick) -> tuple[Tensor, Losses] | Tensor:
        """What backward starts from, and the losses, detached; the logits where they are asked for."""
        targets, sequence = batch
        if not isinstance(asked, Denominators):
            return self.model.part_logits(None, sequence, asked)
        losses = self.model.loss(sequence.tokens, targets, sequence)
        return objective_of(losses, asked), added(None, losses)


@runtime_checkable
class PartitionMap(Protocol):
    """Where DeepSpeed keeps what, which depends on the stage; read from release 0.19.8."""

    def partitions(self) -> list[Tensor]:
        """What this rank updates: for each group of the optimizer numbers of many parameters in a row."""
        ...

    def index(self, parameter: nn.Parameter) -> int:
        """Which partition is for a trained parameter, also where this rank holds nothing of it."""
        ...

    def slot(self, parameter: nn.Parameter) -> Slot | None:
        """Where this rank keeps its numbers of a parameter."""
        ...

    def read(self, parameter: nn.Parameter) -> Tensor | None:
        """The part of the weights that forward reads of this rank, where these are cut."""
        ...

    def sync_params(self) -> None:
        """Gives forward the weights of the partitions. Collective."""
        ...


class FlatPartitions(PartitionMap):
    """Stages 1 and 2: forward has whole weights, and one row of all of a group is cut over the ranks."""

    def __init__(self, engine: Any) -> None:
        self._inner = engine.optimizer
        groups = enumerate(self._inner.bit16_groups)
        self._index = {parameter: index for index, group in groups for parameter in group}

    def partitions(self) -> list[Tensor]:
        """What this rank updates."""
        return self._inner.single_partition_of_fp32_groups

    def index(self, parameter: nn.Parameter) -> int:
        """Which partition is for a trained parameter."""
        return self._index[parameter]

    def slot(self, parameter: nn.Parameter) -> Slot | None:
        """Where this rank keeps its numbers of a parameter: of a frozen one all."""
        if not parameter.requires_grad:
            return Slot(parameter.data.view(-1), 0, parameter.numel(), 0)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Slot(self.partitions()[self.index(parameter)], here.start, here.numel, there.start)

    def read(self, parameter: nn.Parameter) -> Tensor | None:
        """None: weights are whole."""
        return None

    def sync_params(self) -> None:
        """Gives forward the weights of the partitions. Collective."""
        self._inner.update_lp_params()


class Stage3Partitions(PartitionMap):
    """Stage 3: each parameter is a row that is cut over the ranks, and gathered while it is used."""

    def __init__(self, engine: Any, rank: int) -> None:
        self._inner, self._module, self._rank = engine.optimizer, engine.module, rank

    def partitions(self) -> list[Tensor]:
        """What this rank updates."""
        return self._inner.fp32_partitioned_groups_flat

    def index(self, parameter: nn.Parameter) -> int:
        """Which partition is for a trained parameter."""
        return self._inner.grad_position[self._inner.get_param_id(parameter)][0]

    def slot(self, parameter: nn.Parameter) -> Slot | None:
        """Where this rank keeps its numbers of a parameter."""
        held: Any = parameter
        size = held.ds_tensor.ds_numel
        # Parts are of one size; the last ones hold what is left, or nothing.
        start = self._rank * size
        count = min(size, held.ds_numel - start)
        if count <= 0:
            return None
        if not parameter.requires_grad:
            return Slot(held.ds_tensor.data, 0, count, start)
        offset = self._inner.grad_position[self._inner.get_param_id(parameter)][1]
        return Slot(self.partitions()[self.index(parameter)], offset, count, start)

    def read(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part, which is gathered for forward."""
        held: Any = parameter
        return held.ds_tensor.data

    @torch.no_grad()
    def sync_params(self) -> None:
        """Gives forward the weights of the partitions. Collective."""
        self._inner.parameter_offload.partition_all_parameters()
        for parameter in self._module.parameters():
            slot = self.slot(parameter)
            if slot is not None:
                parameter.ds_tensor.data[: slot.length].copy_(slot.partition[_span(slot)])


class Engine:
    """DeepSpeed's engine: it runs, clips and updates."""

    def __init__(
        self,
        engine: Any,
        optimizer: Optimizer,
        partition_map: PartitionMap,
        size: int,
        initial_state: InitialState,
    ) -> None:
        self._engine, self._adam, self._size, self.partition_map = engine, optimizer, size, partition_map
        self._initial_state = initial_state

    def step(self, batches: Sequence[MicroBatch], denominators: Denominators) -> Losses:
        """Forward and backward of all micro-batches. Adds to gradients; gives this rank's sums, detached."""
        total: Losses | None = None
        for batch in batches:
            objective, losses = self._engine(batch, denominators)
            # DeepSpeed takes the mean over ranks, we mean the sum. What is not finite must reach the
            # gradients, since their norm decides whether the step is taken.
            factor = torch.where(objective.detach().isfinite(), float(self._size), torch.nan)
            self._engine.backward(objective * factor, scale_wrt_gas=False)
            total = added(total, losses)
        assert total is not None, "a step has a micro-batch at least"
        return total

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> Float[Tensor, ""]:
        """This rank's share of the summed cross-entropy, without gradients and without dropout."""
        was_training = self._engine.training
        self._engine.eval()
        depth = self._engine.module.model.config.model.mtp.depth
        _, losses = self._engine(batch, undivided(batch, depth))
        self._engine.train(was_training)
        return losses.cross_entropy

    @torch.no_grad()
    def logits(self, batch: MicroBatch, pick: Pick) -> Float[Tensor, "V"]:
        """The logits after the hidden state that `pick` gives, without gradients and without dropout."""
        was_training = self._engine.training
        self._engine.eval()
        logits = self._engine(batch, pick)
        self._engine.train(was_training)
        return logits

    def update(self) -> tuple[float, bool]:
        """Sums gradients over ranks, clips and steps; gives their norm and whether all was finite."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()

    def weights(self, parameter: nn.Parameter) -> FlatSlice | None:
        """The numbers of a parameter that this rank keeps; those that forward reads follow by `spread`."""
        slot = self.partition_map.slot(parameter)
        return None if slot is None else FlatSlice(slot.partition.detach()[_span(slot)], slot.start)

    def moment(self, parameter: nn.Parameter, key: str) -> FlatSlice | None:
        """The same of a moment."""
        slot = self.partition_map.slot(parameter)
        return None if slot is None else FlatSlice(self.state(parameter)[key][_span(slot)], slot.start)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's state of a parameter's partition; made if missing, as the first step would."""
        partition = self.partition_map.partitions()[self.partition_map.index(parameter)]
        state = self._adam.state[partition]
        if not state:
            state.update(self._initial_state(partition))
        return state


def _span(slot: Slot) -> slice:
    return slice(slot.offset, slot.offset + slot.length)


@dataclass(frozen=True)
class Partitioned(Parallel):
    """A model whose weights DeepSpeed keeps. parameters: those of the whole model by name."""

    engine: Engine
    parameters: Mapping[str, nn.Parameter]

    def checkpoint_view(self, name: str, x: Tensor) -> Tensor:
        """A parameter as checkpoints take it."""
        return self._checkpoint_view(name, self.engine.weights(self.parameters[name]))

    def checkpoint_moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state of every trained parameter, as checkpoints take it."""
        found = {}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                # What has the shape of the partition is of its numbers; a count of steps is of all of them.
                found[name] = {
                    key: self._checkpoint_view(name, self.engine.moment(parameter, key)) if x.ndim else x
                    for key, x in self.engine.state(parameter).items()
                }
        return found

    @torch.no_grad()
    def fill(self, name: str, x: Tensor, whole: Tensor) -> None:
        """Copies from the whole parameter what this rank holds of it."""
        parameter = self.parameters[name]
        run, read = self.engine.weights(parameter), self.engine.partition_map.read(parameter)
        if run is not None:
            numbers = whole.reshape(-1)[run.start : run.start + len(run.numbers)]
            run.numbers.copy_(numbers)
            if read is not None:
                read[: len(numbers)].copy_(numbers)
        if parameter.shape == whole.shape:
            parameter.data.copy_(whole)

    def _checkpoint_view(self, name: str, run: FlatSlice | None) -> Tensor:
        numbers, start = run or FlatSlice(torch.empty(0), 0)
        return GlobalShardView.of_flat_slice(numbers, start, self.shard_maps[name].shape)


def partition(
    built: Parallel,
    optimizer: Optimizer,
    world: World,
    config: ZeroConfig,
    *,
    clip_norm: float,
    step_shape: tuple[int, int],
    initial_state: InitialState,
) -> Partitioned:
    """Hands a plain model and its optimizer over to DeepSpeed. Mutates both.

    work: micro-batches of a step on this rank, and rows of each.
    """
    model = built.whole
    assert model is not None, f"{built.parts=}"
    parameters = dict(built.named_parameters())
    numbers = sum(parameter.numel() for parameter in parameters.values())
    engine, *_ = _deepspeed(world.device).initialize(
        model=Objective(model),
        optimizer=optimizer,
        config=engine_config(config, clip_norm, step_shape, min(numbers, BUCKET)),
        dist_init_required=False,
    )
    partition_map = FlatPartitions(engine) if config.stage < 3 else Stage3Partitions(engine, world.rank)
    driven = Engine(engine, optimizer, partition_map, world.size, initial_state)
    return Partitioned(built.parts, built.shard_maps, driven, built.names, built.decayed, driven, parameters)


def engine_config(
    config: ZeroConfig, clip_norm: float, step_shape: tuple[int, int], bucket: int
) -> dict[str, object]:
    """What DeepSpeed is told. bucket: how many numbers go through one collective together."""
    zero: dict[str, object] = {
        "stage": config.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
        "stage3_param_persistence_threshold": config.whole_below,
    }
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": step_shape[1],
        "gradient_accumulation_steps": step_shape[0],
        # Backward adds up, and the one `step` after all micro-batches is the update.
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        # torch's fused AdamW also where state waits on the CPU: the same arithmetic, and nothing to compile.
        "zero_force_ds_cpu_optimizer": False,
        # Ours are updates of each number alone, as those that DeepSpeed names are.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def _deepspeed(device: torch.device) -> Any:
    # Takes seconds, so only runs that want it import it.
    import deepspeed

    # It calls collectives by names that torch is about to retire; nobody who reads a run can act on that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        class Uncompiled(CPU_Accelerator):
            # On CPUs DeepSpeed would compile collectives in C++ before the first step; gloo has them.
            def create_op_builder(self, op_name: str) -> None:
                return None

        set_accelerator(Uncompiled())
    return deepspeed
