"""The schedules of torch.distributed.pipelining over the stages of a plan, and the order that they run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.config.pipeline import PipelinePlan, ScheduleName

BUILDERS: dict[ScheduleName, type] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}


def build_schedule(plan: PipelinePlan, stages: Sequence[PipelineStage]) -> Any:
    """The schedule of torch over this rank's stages, ascending; the last stage gives the objective itself."""
    options = {"n_microbatches": plan.micro_batches, "loss_fn": _objective, "scale_grads": False}
    if plan.schedule == "1f1b":
        return Schedule1F1B(stages[0], **options)
    return BUILDERS[plan.schedule](list(stages), **options)


def _objective(objective: Tensor, micro_batch_index: Tensor) -> Tensor:
    return objective


class Action(NamedTuple):
    """One thing that a rank does; backward is input and weight at once."""

    stage: int
    kind: Literal["forward", "backward", "input", "weight"]
    micro_batch: int


@dataclass
class _StageShape:
    # What the schedules ask of a stage before they run one.
    num_stages: int
    group_size: int
    group_rank: int = 0
    submod: None = None
    stage_index_to_group_rank: dict[int, int] = field(default_factory=dict)


_LETTERS: dict[str, Literal["forward", "backward", "input", "weight"]] = {
    "F": "forward",
    "B": "backward",
    "I": "input",
    "W": "weight",
}


def action_order(plan: PipelinePlan) -> list[list[Action]]:
    """What each rank computes, in order. Needs no processes."""
    if plan.schedule == "1f1b":
        return [_one_forward_one_backward(plan, rank) for rank in range(plan.degree)]
    stage_shapes = [_StageShape(plan.stages, plan.degree) for _ in range(plan.chunks)]
    schedule = BUILDERS[plan.schedule](stage_shapes, plan.micro_batches, _objective, scale_grads=False)
    runs = schedule.pipeline_order_with_comms
    return [
        [
            Action(action.stage_index, _LETTERS[action.computation_type.value], action.microbatch_index)
            for step in runs[rank]
            for action in (step.sub_actions or (step,))
            if action.computation_type.value in _LETTERS
        ]
        for rank in range(plan.degree)
    ]


def _one_forward_one_backward(plan: PipelinePlan, rank: int) -> list[Action]:
    # torch 2.13 keeps no list of what this schedule runs; the one that it prints starts the last rank at
    # micro-batch 1.
    warmup = min(plan.micro_batches, plan.degree - rank)
    order = [Action(rank, "forward", index) for index in range(warmup)]
    for index in range(plan.micro_batches):
        order.append(Action(rank, "backward", index))
        if warmup + index < plan.micro_batches:
            order.append(Action(rank, "forward", warmup + index))
    return order
