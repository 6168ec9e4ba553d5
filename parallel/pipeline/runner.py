"""Pipeline parallelism: the layers of a model on ranks one after the other.

Only the residual stream and its gradient cross from stage to stage; token ids, positions and targets are
known everywhere. A stage's own losses enter backward where its stream leaves it.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from conf.errors import ConfigError
from model.config import Architecture
from model.language_model import Losses, ModelPart, loss_names
from model.layout import DENSE, MOE, NONE
from parallel.config.pipeline import PipelinePlan, plan_violations
from parallel.mesh.axes import Axis
from parallel.mesh.collectives import sum_over, swapped
from parallel.micro_batches import Denominators, MicroBatch, Pick, added, objective_of, undivided
from parallel.pipeline.schedules import build_schedule


class Stage(ModelPart):
    """The part of a model that one stage of a pipeline runs. Its forward takes the index of a micro-batch.

    `rows` are where its mixtures of experts stand among the `total` of the model.
    """

    def __init__(self, config: Architecture, dtype: torch.dtype, layers: Items[int]) -> None:
        super().__init__(config, dtype, layers)
        mtp = config.model.mtp
        has_experts = [layer.ffn not in (DENSE, NONE) for layer in config.layers]
        has_experts += [mtp.ffn == MOE] * mtp.depth
        own = [*layers, *(range(config.model.depth, len(has_experts)) if self.is_last else ())]
        self.rows = [sum(has_experts[:index]) for index in own if has_experts[index]]
        self.total = sum(has_experts)
        self.sums: Losses | None = None
        # Set from outside where tensors have no numbers.
        self.micro_batch_number: Callable[[Tensor], int] = int
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

    def forward(
        self, stream: Float[Tensor, "B P *n D"] | None = None, *, micro_batch_index: Int[Tensor, "1"]
    ) -> Tensor:
        """The stream of the next stage, or the objective after the last.

        micro_batch_index is on the CPU. Mutates `sums`.
        """
        assert self._denominators is not None, "forward before begin"
        targets, sequence = self._batches[self.micro_batch_number(micro_batch_index)]
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


def _nothing_left() -> Callable[[], None]:
    # Weights that several branches share, as those of the head where there are MTP modules, defeat torch's
    # split of backward. Such a stage does all of it when the gradient of its input is due, nothing after.
    return lambda: None


def build_stages(
    config: Architecture, dtype: torch.dtype, plan: PipelinePlan, rank: int, layers: Items[Items[int]]
) -> list[Stage]:
    """The stages of one rank of the pipeline, ascending. `layers` are those of all stages."""
    return [Stage(config, dtype, layers[stage]) for stage in plan.stages_of(rank)]


class Pipeline:
    """This rank's stages and the schedule that runs them; all ranks of the axis must call it alike.

    Gradients are summed, never averaged.
    """

    def __init__(
        self,
        stages: Items[Stage],
        axis: Axis,
        plan: PipelinePlan,
        shape: tuple[int, int],
        device: torch.device,
        degree: int = 1,
        link: type[PipelineStage] = PipelineStage,
    ) -> None:
        """`shape` are rows and tokens of a micro-batch on this rank, whose stream `degree` ranks share out.
        `link` ties a stage to those beside it.

        Raises ConfigError for an impossible plan.
        """
        violations = plan_violations(plan)
        if violations:
            raise ConfigError(violations)
        assert axis.size == plan.degree, f"{axis.size=} {plan.degree=}"
        self.stages, self.plan, self.shape = tuple(stages), plan, shape
        self._axis, self._device, self._degree = axis, device, degree
        for stage in stages:
            if isinstance(stage, FSDPModule) and plan.schedule != "1f1b":
                # Backward is split along the weights that forward saw; sharded ones would get no gradient.
                # The schedule itself gathers and frees the weights of a stage.
                stage.set_reshard_after_forward(False)
        stream = self._stream(shape, torch.device("meta")).requires_grad_()
        objective = torch.empty((), dtype=_at_least_float32(stream.dtype), device="meta").requires_grad_()
        self._schedule = build_schedule(
            plan,
            [
                link(
                    stage,
                    index,
                    plan.stages,
                    device,
                    input_args=() if stage.is_first else (stream,),
                    output_args=(objective if stage.is_last else stream,),
                    group=axis.group,
                    dw_builder=_nothing_left if stage.mtp else None,
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
        # The schedule splits tensors only, so each micro-batch is passed as its index.
        micro_batch_indices = torch.arange(self.plan.micro_batches)
        self._schedule.step(
            micro_batch_index=micro_batch_indices, target=micro_batch_indices, return_outputs=False
        )
        for stage in self.stages:
            _lay_out_gradients(stage)
        self._sum_copies()
        return self._joined([stage.end() for stage in self.stages])

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> Float[Tensor, ""]:
        """This rank's share of the summed cross-entropy, without gradients and without dropout.

        Collective over the axis.
        """
        total = torch.zeros((), dtype=_at_least_float32(self.stages[0].dtype), device=self._device)

        def run(stage: Stage, stream: Tensor | None) -> Tensor:
            stage.begin([batch], undivided(batch, stage.config.model.mtp.depth))
            out = stage(stream, micro_batch_index=torch.zeros(1, dtype=torch.long))
            total.add_(stage.end().cross_entropy)
            return out

        self._forward((batch.targets.shape[0], batch.targets.shape[1]), run)
        return total

    @torch.no_grad()
    def logits(self, batch: MicroBatch, pick: Pick) -> Float[Tensor, "M"]:
        """The logits of this rank's part of the vocabulary after the hidden state that `pick` gives.

        The same on all ranks of the axis. Without gradients and without dropout. Collective over the axis.
        """
        shape = (batch.targets.shape[0], batch.targets.shape[1])
        found = self._forward(shape, lambda stage, x: stage.part_logits(x, batch.sequence, pick))
        if found is None:
            first = self.stages[0]
            size = first.config.model.vocab_size // self._degree
            found = torch.zeros(size, dtype=first.dtype, device=self._device)
        return sum_over(found, self._axis)

    def _forward(
        self, shape: tuple[int, int], run: Callable[[Stage, Tensor | None], Tensor]
    ) -> Tensor | None:
        """Runs this rank's stages on one micro-batch; what the last of the model gives, None elsewhere."""
        home = {stage: rank for rank in range(self.plan.degree) for stage in self.plan.stages_of(rank)}
        stream = found = None
        for index, stage in zip(self.plan.stages_of(self._axis.rank), self.stages, strict=True):
            if index and home[index - 1] != self._axis.rank:
                stream = self._stream(shape, self._device)
                dist.recv(stream, self._axis.ranks[home[index - 1]], self._axis.group)
            was_training = stage.training
            stage.eval()
            stream = run(stage, stream)
            stage.train(was_training)
            if stage.is_last:
                found = stream
            elif home[index + 1] != self._axis.rank:
                dist.send(stream.contiguous(), self._axis.ranks[home[index + 1]], self._axis.group)
        return found

    def _stream(self, shape: tuple[int, int], device: torch.device) -> Float[Tensor, "B P *n D"]:
        config = self.stages[0].config
        streams = (config.residual.streams,) if config.residual.kind == "hyper" else ()
        sizes = (shape[0], shape[1] // self._degree, *streams, config.model.width)
        return torch.empty(sizes, dtype=self.stages[0].dtype, device=device)

    def _sum_copies(self) -> None:
        # Both ends of the pipeline step the same table by the same gradient.
        model = self.stages[0].config.model
        if not (model.has_tied_embeddings or model.mtp.depth):
            return
        ends = [stage.embed.weight for stage in self.stages if stage.embed is not None]
        # A frozen table has none, at either end.
        tables = [_local(table.grad) for table in ends if table.grad is not None]
        if len(tables) == 2:
            tables[0].add_(tables[1])
            tables[1].copy_(tables[0])
        elif tables:
            peer = self._axis.ranks[-1 if self._axis.rank == 0 else 0]
            tables[0].add_(swapped(tables[0], peer, self._axis))

    def _joined(self, sums: list[Losses]) -> Losses:
        # Every rank must name all losses of the model, also those of other stages.
        names = loss_names(self.stages[0].config)
        total = None
        for losses in sums:
            like = losses.cross_entropy
            auxiliary = {name: losses.auxiliary.get(name, torch.zeros_like(like)) for name in names}
            total = added(total, losses._replace(auxiliary=auxiliary))
        assert total is not None, "a rank has a stage at least"
        return total


def _lay_out_gradients(stage: Stage) -> None:
    # A split backward leaves gradients with the strides that they came with; fused optimizers read them with
    # those of the parameter.
    for parameter in stage.parameters():
        grad = parameter.grad
        if grad is not None and grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(grad)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
