"""When each rank of a pipeline computes, simulated from the actions that the schedule really runs.

A rank runs its actions one after the other; each waits for what it needs from the stages beside it. Overlap
within a rank is not modelled: a forward and a backward that DualPipe-V runs together take their sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

from parallel.config.pipeline import PipelinePlan
from parallel.pipeline.cost import Cost
from parallel.pipeline.schedules import Action, action_order


class Busy(NamedTuple):
    """One action and when it ran, in the unit of the costs."""

    action: Action
    start: float
    end: float


class Timeline(NamedTuple):
    """What each rank does in one step, in order."""

    ranks: tuple[tuple[Busy, ...], ...]

    @property
    def span(self) -> float:
        """From the first start to the last end."""
        return max(busy[-1].end for busy in self.ranks)

    @property
    def bubble(self) -> float:
        """The share of the span in which a rank waits, over all ranks; in [0, 1)."""
        worked = sum(part.end - part.start for busy in self.ranks for part in busy)
        return 1 - worked / (self.span * len(self.ranks))


def simulate(plan: PipelinePlan, costs: Sequence[Cost], transfer: float = 0.0) -> Timeline:
    """The timeline of one step. `costs` are those of each stage and micro-batch.

    transfer is the time from one rank to the next. O(actions ranks).
    """
    assert len(costs) == plan.stages, f"{len(costs)=} {plan.stages=}"
    home = {stage: rank for rank in range(plan.degree) for stage in plan.stages_of(rank)}
    order = action_order(plan)
    ended: dict[tuple[str, int, int], float] = {}
    ranks: list[list[Busy]] = [[] for _ in order]
    while any(len(busy) < len(actions) for busy, actions in zip(ranks, order, strict=True)):
        before = len(ended)
        for rank, (busy, actions) in enumerate(zip(ranks, order, strict=True)):
            while len(busy) < len(actions):
                action = actions[len(busy)]
                times = [busy[-1].end if busy else 0.0]
                for kind, stage in _needs(action, plan.stages):
                    end = ended.get((kind, stage, action.micro_batch))
                    if end is None:
                        break
                    times.append(end + (transfer if home[stage] != rank else 0.0))
                else:
                    start = max(times)
                    busy.append(Busy(action, start, start + _duration(action, costs[action.stage])))
                    ended[_gives(action), action.stage, action.micro_batch] = busy[-1].end
                    continue
                break
        assert len(ended) > before, f"{plan} waits for itself"
    return Timeline(tuple(tuple(busy) for busy in ranks))


def _gives(action: Action) -> str:
    # The gradient of the input is what the stage before waits for, whoever computes it.
    return "input" if action.kind == "backward" else action.kind


def _needs(action: Action, stages: int) -> list[tuple[str, int]]:
    stage = action.stage
    if action.kind == "forward":
        return [("forward", stage - 1)] if stage else []
    if action.kind == "weight":
        return [("input", stage)]
    return [("forward", stage), *([("input", stage + 1)] if stage + 1 < stages else [])]


def _duration(action: Action, cost: Cost) -> float:
    if action.kind == "forward":
        return cost.forward
    # Nobody waits for the gradient of the first stage's input: torch leaves all of its backward to the end.
    whole = action.kind == "backward" or (action.stage == 0 and action.kind == "weight")
    if whole:
        return cost.input + cost.weight
    return (0.0 if action.stage == 0 else cost.input) if action.kind == "input" else cost.weight
