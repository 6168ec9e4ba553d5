"""How a pipeline may run: its schedules, which stages a rank holds, what is possible; without torch.

A rank holds `chunks` stages: rank, rank + degree and so on, or, where the schedule is a V, rank and its
mirror image, so that the first and the last stage share a rank.
"""

from typing import Literal, NamedTuple

from conf.errors import Violation

ScheduleName = Literal["1f1b", "interleaved", "zero_bubble", "zero_bubble_v", "dualpipe_v"]


class ScheduleKind(NamedTuple):
    """What a schedule needs: the fewest and the most stages per rank, None for any number."""

    chunks: tuple[int, int | None]
    is_v: bool = False


SCHEDULE_KINDS: dict[ScheduleName, ScheduleKind] = {
    "1f1b": ScheduleKind((1, 1)),
    "interleaved": ScheduleKind((2, None)),
    "zero_bubble": ScheduleKind((1, None)),
    "zero_bubble_v": ScheduleKind((2, 2), is_v=True),
    "dualpipe_v": ScheduleKind((2, 2), is_v=True),
}


def fewest_chunks(schedule: ScheduleName) -> int:
    """The fewest stages per rank that a schedule runs."""
    return SCHEDULE_KINDS[schedule].chunks[0]


class PipelinePlan(NamedTuple):
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
        if SCHEDULE_KINDS[self.schedule].is_v:
            return rank, self.stages - 1 - rank
        return tuple(range(rank, self.stages, self.degree))


def plan_violations(plan: PipelinePlan) -> list[Violation]:
    """Everything that makes the plan impossible, with nearest legal values."""
    found = []
    low, high = SCHEDULE_KINDS[plan.schedule].chunks
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
