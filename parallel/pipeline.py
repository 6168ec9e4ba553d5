"""Pipeline parallelism: the layers of a model on ranks one after the other.

Only the residual stream and its gradient cross from stage to stage; token ids, positions and targets are
known everywhere. A stage's own losses enter backward where its stream leaves it.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from conf.errors import ConfigError
from model.config import Architecture
from model.language_model import Losses, Part
from model.layout import DENSE, MOE, NONE
from model.mixer import Sequence
from parallel.axes import Axis
from parallel.schedules import Plan, build_schedule, plan_violations


class MicroBatch(NamedTuple):
    """Rows that go through the stages together."""

    targets: Int[Tensor, "B T"]
    sequence: Sequence


class Denominators(NamedTuple):
    """What the losses are divided by: targets and tokens of the whole global batch."""

    targets: Int[Tensor, ""]
    tokens: int


class Stage(Part):
    """The part of a model that one stage of a pipeline runs. Its forward takes the place of a micro-batch.

    `rows` are where its mixtures of experts stand among the `total` of the model.
    """

    def __init__(self, config: Architecture, dtype: torch.dtype, layers: range) -> None:
        super().__init__(config, dtype, layers)
        ahead = config.model.prediction
        has_experts = [layer.ffn not in (DENSE, NONE) for layer in config.layers]
        has_experts += [ahead.ffn == MOE] * ahead.depth
        stop = len(has_experts) if self.is_last else layers.stop
        self.rows = slice(sum(has_experts[: layers.start]), sum(has_experts[:stop]))
        self.total = sum(has_experts)
        self.sums: Losses | None = None
        self._batches: Items[MicroBatch] = ()
        self._denominators: Denominators | None = None

    def begin(self, batches: Items[MicroBatch], denominators: Denominators) -> None:
        """Takes the micro-batches of a step. Mutates `sums`, which then gathers their losses, detached."""
        self._batches, self._denominators, self.sums = batches, denominators, None

    def end(self) -> Losses:
        """The sums of the losses since `begin`, with a row for each mixture of experts of the model."""
        sums, self.sums = self.sums, None
        self._batches, self._denominators = (), None
        assert sums is not None, f"{self.layers=} ran no micro-batch"
        if not self.total:
            return sums
        load = sums.load.new_zeros(self.total, self.config.moe.num_choices)
        entropy = sums.entropy.new_zeros(self.total)
        if sums.load.numel():
            load[self.rows], entropy[self.rows] = sums.load, sums.entropy
        return sums._replace(load=load, entropy=entropy)

    def forward(self, stream: Float[Tensor, "B T *n D"] | None = None, *, place: Int[Tensor, "1"]) -> Tensor:
        """The stream of the next stage, or the objective after the last.

        place counts the micro-batches and is on the CPU. Mutates `sums`.
        """
        assert self._denominators is not None, "forward before begin"
        targets, sequence = self._batches[int(place)]
        if stream is not None and stream.requires_grad:
            # What is sent back must lie in one piece. The schedule reuses its tensors: a hook on one of them
            # would stay.
            stream = stream.view_as(stream)
            stream.register_hook(torch.Tensor.contiguous)
        stream, losses = self.part_loss(stream, targets, sequence)
        self.sums = added(self.sums, losses)
        objective = objective_of(losses, self._denominators)
        return objective if stream is None else cast(Tensor, _Tie.apply(stream, objective))


class _Tie(torch.autograd.Function):
    """The stream; its backward also starts that of an objective, with gradient one."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, objective: Tensor) -> Tensor:
        ctx.dtype, ctx.device = objective.dtype, objective.device
        # Not a view: the schedules detach in place what they have sent.
        return stream.contiguous().detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=ctx.dtype, device=ctx.device)


def objective_of(losses: Losses, denominators: Denominators) -> Float[Tensor, ""]:
    """What backward starts from: every loss over its global count."""
    targets = denominators.targets.clamp(min=1)
    objective = (losses.cross_entropy + losses.prediction + losses.logit_z) / targets
    for part in losses.auxiliary.values():
        objective = objective + part / denominators.tokens
    return objective


def added(total: Losses | None, losses: Losses) -> Losses:
    """The sums so far with those of one more micro-batch, detached."""
    parts = [part.detach() for part in losses.parts()]
    if total is not None:
        parts = [a + b for a, b in zip(total.parts(), parts, strict=True)]
    return losses.with_parts(parts)


def _nothing_left() -> Callable[[], None]:
    # Weights that several branches share, as those of the head where modules predict ahead, defeat torch's
    # split of backward. Such a stage does all of it when the gradient of its input is due, nothing after.
    return lambda: None


def build_stages(
    config: Architecture, dtype: torch.dtype, plan: Plan, rank: int, layers: Items[range]
) -> list[Stage]:
    """The stages of one rank of the pipeline, ascending. `layers` are those of all stages."""
    return [Stage(config, dtype, layers[stage]) for stage in plan.stages_of(rank)]


class Pipeline:
    """This rank's stages and the schedule that runs them.

    All ranks of the axis must call `step` alike. Gradients are summed, never averaged.
    """

    def __init__(
        self,
        stages: Items[Stage],
        axis: Axis,
        plan: Plan,
        shape: tuple[int, int],
        device: torch.device,
    ) -> None:
        """`shape` are rows and tokens of a micro-batch on this rank. Raises ConfigError."""
        violations = plan_violations(plan)
        if violations:
            raise ConfigError(violations)
        assert axis.size == plan.degree, f"{axis.size=} {plan.degree=}"
        self.stages, self.plan, self.shape = tuple(stages), plan, shape
        self._axis, self._names = axis, None
        for stage in stages:
            if isinstance(stage, FSDPModule) and plan.schedule != "1f1b":
                # Backward is split along the weights that forward saw; sharded ones would get no gradient.
                # The schedule itself gathers and frees the weights of a stage.
                stage.set_reshard_after_forward(False)
        config, dtype = stages[0].config, stages[0].dtype
        streams = (config.residual.streams,) if config.residual.kind == "hyper" else ()
        stream = torch.empty(*shape, *streams, config.model.width, dtype=dtype, device="meta")
        stream.requires_grad_()
        objective = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="meta")
        objective.requires_grad_()
        self._schedule = build_schedule(
            plan,
            [
                PipelineStage(
                    stage,
                    index,
                    plan.stages,
                    device,
                    input_args=() if stage.is_first else (stream,),
                    output_args=(objective if stage.is_last else stream,),
                    group=axis.group,
                    dw_builder=_nothing_left if stage.predictions else None,
                )
                for index, stage in zip(plan.stages_of(axis.rank), stages, strict=True)
            ],
        )

    def step(self, batches: Items[MicroBatch], denominators: Denominators) -> Losses:
        """Forward and backward of all micro-batches. Adds to the gradients of this rank's stages.

        The losses are sums over this rank's stages; those of other stages are zero. Collective over the
        axis. Raises ValueError for micro-batches of another number or shape than the pipeline was built for.
        """
        found = [tuple(batch.targets.shape) for batch in batches]
        if found != [self.shape] * self.plan.micro_batches:
            legal = f"{self.plan.micro_batches} of {self.shape}"
            raise ValueError(f"batches: found shapes {found}, the pipeline runs {legal}")
        for stage in self.stages:
            stage.begin(batches, denominators)
        # The schedule splits tensors only, so each micro-batch travels as its place.
        places = torch.arange(self.plan.micro_batches)
        self._schedule.step(place=places, target=places, return_outputs=False)
        self._sum_copies()
        return self._joined([stage.end() for stage in self.stages])

    @property
    def copies(self) -> tuple[nn.Parameter, ...]:
        """Parameters of this rank that an earlier stage counts: the last stage's embedding."""
        last = self.stages[-1]
        table = last.embed if last.is_last and not last.is_first else None
        return () if table is None else (table.weight,)

    def _sum_copies(self) -> None:
        # Both ends of the pipeline step the same table by the same gradient.
        model = self.stages[0].config.model
        if not (model.has_tied_embeddings or model.prediction.depth):
            return
        ends = [stage.embed for stage in self.stages if stage.embed is not None]
        tables = [_local(cast(Tensor, table.weight.grad)) for table in ends]
        if len(tables) == 2:
            tables[0].add_(tables[1])
            tables[1].copy_(tables[0])
        elif tables:
            ranks, group = self._axis.ranks, self._axis.group
            peer = ranks[-1] if self._axis.rank == 0 else ranks[0]
            own, other = tables[0].contiguous(), torch.empty_like(tables[0]).contiguous()
            operations = [
                dist.P2POp(dist.isend, own, peer, group),
                dist.P2POp(dist.irecv, other, peer, group),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            tables[0].add_(other)

    def _joined(self, sums: list[Losses]) -> Losses:
        # Which losses there are depends on the layers; every rank must name all of them.
        if self._names is None:
            own = [name for losses in sums for name in losses.auxiliary]
            found: list[list[str]] = [[] for _ in self._axis.ranks]
            dist.all_gather_object(found, own, group=self._axis.group)
            self._names = sorted({name for names in found for name in names})
        total = None
        for losses in sums:
            zero = torch.zeros_like(losses.cross_entropy)
            auxiliary = {name: losses.auxiliary.get(name, zero) for name in self._names}
            total = added(total, losses._replace(auxiliary=auxiliary))
        assert total is not None, "a rank has a stage at least"
        return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
