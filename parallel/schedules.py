"""Pipeline schedules: which stages a rank holds, and in which order it runs them.

The schedules are those of torch.distributed.pipelining. A rank holds `chunks` stages: rank, rank + degree and
so on, or, where the schedule is a V, rank and its mirror image, so that the first and the last stage share a
rank.
"""

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

from conf.errors import Violation

ScheduleName = Literal["1f1b", "interleaved", "zero_bubble", "zero_bubble_v", "dualpipe_v"]


class Kind(NamedTuple):
    """What a schedule needs. chunks are the fewest and the most stages per rank, None for any number."""

    build: type
    chunks: tuple[int, int | None]
    is_v: bool


KINDS: dict[ScheduleName, Kind] = {
    "1f1b": Kind(Schedule1F1B, (1, 1), is_v=False),
    "interleaved": Kind(ScheduleInterleaved1F1B, (2, None), is_v=False),
    "zero_bubble": Kind(ScheduleInterleavedZeroBubble, (1, None), is_v=False),
    "zero_bubble_v": Kind(ScheduleZBVZeroBubble, (2, 2), is_v=True),
    "dualpipe_v": Kind(ScheduleDualPipeV, (2, 2), is_v=True),
}


class Plan(NamedTuple):
    """How a pipeline runs: `degree` ranks with `chunks` stages each, and micro-batches per step."""

    schedule: ScheduleName
    degree: int
    chunks: int
    micro_batches: int

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.degree * self.chunks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending."""
        if KINDS[self.schedule].is_v:
            return rank, self.stages - 1 - rank
        return tuple(range(rank, self.stages, self.degree))


def plan_violations(plan: Plan) -> list[Violation]:
    """Everything that makes the plan impossible, with nearest legal values."""
    found = []
    low, high = KINDS[plan.schedule].chunks
    if plan.degree < 2:
        found.append(Violation("parallel.pp", f"a pipeline needs 2 ranks or more; found {plan.degree}"))
    if plan.chunks < low or (high is not None and plan.chunks > high):
        legal = str(low) if low == high else f"at least {low}"
        message = f"{plan.schedule} runs {legal} stages per rank; found {plan.chunks}"
        found.append(Violation("parallel.pp_chunks", message))
    if found:
        return found
    least = {"1f1b": plan.degree, "dualpipe_v": plan.stages}.get(plan.schedule, 1)
    if plan.micro_batches < least:
        message = f"{plan.schedule} over {plan.degree} ranks needs {least} micro-batches or more"
        found.append(Violation("train.micro_batch", f"{message}; found {plan.micro_batches}"))
    elif plan.schedule in ("interleaved", "zero_bubble"):
        rounds = max(1, plan.micro_batches // plan.degree)
        if plan.micro_batches % rounds:
            below = plan.micro_batches - plan.micro_batches % plan.degree
            message = f"{plan.schedule} runs micro-batches in rounds of {plan.degree}"
            message += f"; found {plan.micro_batches}, use {below} or {below + plan.degree}"
            found.append(Violation("train.micro_batch", message))
    return found


def build_schedule(plan: Plan, stages: Sequence[PipelineStage]) -> Any:
    """The schedule of torch over this rank's stages, ascending; the last stage gives the objective itself."""
    options = {"n_microbatches": plan.micro_batches, "loss_fn": _objective, "scale_grads": False}
    if plan.schedule == "1f1b":
        return Schedule1F1B(stages[0], **options)
    return KINDS[plan.schedule].build(list(stages), **options)


def _objective(objective: Tensor, place: Tensor) -> Tensor:
    return objective


class Action(NamedTuple):
    """One thing that a rank does; backward is input and weight at once."""

    stage: int
    kind: Literal["forward", "backward", "input", "weight"]
    micro_batch: int


@dataclass
class _Place:
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


def action_order(plan: Plan) -> list[list[Action]]:
    """What each rank computes, in order. Needs no processes."""
    if plan.schedule == "1f1b":
        return [_one_forward_one_backward(plan, rank) for rank in range(plan.degree)]
    places = [_Place(plan.stages, plan.degree) for _ in range(plan.chunks)]
    schedule = KINDS[plan.schedule].build(places, plan.micro_batches, _objective, scale_grads=False)
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


def _one_forward_one_backward(plan: Plan, rank: int) -> list[Action]:
    # torch 2.13 keeps no list of what this schedule runs; the one that it prints starts the last rank at
    # micro-batch 1.
    ahead = min(plan.micro_batches, plan.degree - rank)
    order = [Action(rank, "forward", index) for index in range(ahead)]
    for index in range(plan.micro_batches):
        order.append(Action(rank, "backward", index))
        if ahead + index < plan.micro_batches:
            order.append(Action(rank, "forward", ahead + index))
    return order
