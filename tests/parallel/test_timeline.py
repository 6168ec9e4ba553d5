"""Simulated pipelines keep the order of their schedules and the idle times known in closed form."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from parallel.config.pipeline import SCHEDULE_KINDS, PipelinePlan, plan_violations
from parallel.pipeline.cost import Cost
from parallel.pipeline.schedules import action_order
from parallel.pipeline.timeline import Timeline, simulate


def plans(degree: int, micro_batches: int) -> list[PipelinePlan]:
    return [
        PipelinePlan(name, degree, kind.chunks[1] or 2, micro_batches)
        for name, kind in SCHEDULE_KINDS.items()
    ]


@pytest.mark.parametrize(("degree", "micro_batches"), [(2, 4), (4, 8), (8, 32)])
def test_idle_times_are_the_published_ones(degree: int, micro_batches: int) -> None:
    # Forward and both halves of backward take one, spread over the stages of a rank.
    idle = {}
    for schedule, chunks in (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2)):
        plan = PipelinePlan(schedule, degree, chunks, micro_batches)
        timeline = simulate(plan, [Cost(1 / chunks, 1 / chunks, 1 / chunks)] * plan.stages)
        idle[schedule, chunks] = timeline.span - 3 * micro_batches
        assert timeline.bubble == pytest.approx(1 - 3 * micro_batches / timeline.span)
    assert idle["1f1b", 1] == pytest.approx(3 * (degree - 1))
    assert idle["interleaved", 2] == pytest.approx(3 * (degree - 1) / 2)
    assert idle["zero_bubble", 1] == pytest.approx(degree - 1)
    assert idle["zero_bubble", 2] == pytest.approx((degree - 1) / 2)


def test_the_slowest_stage_of_1f1b_sets_the_pace() -> None:
    fast, faster, slow = Cost(1.0, 1.0, 1.0), Cost(0.5, 0.5, 0.5), Cost(2.0, 2.5, 1.5)
    plan = PipelinePlan("1f1b", 3, 1, 10)
    # All that comes before its first action and after its last waits: 1 + 0.5 forward, 1 + 2 back.
    assert simulate(plan, [fast, faster, slow]).span == pytest.approx(10 * 6.0 + 4.5)
    # In the middle, what comes after it hides behind its second forward.
    assert simulate(plan, [fast, slow, faster]).span == pytest.approx(10 * 6.0 + 3.0)
    # Unless the way is long: twice there and back, less the 2 of that forward.
    assert simulate(plan, [fast, slow, faster], 4.0).span > 10 * 6.0 + 3.0 + 2 * 4.0


def assert_sound(plan: PipelinePlan, costs: list[Cost], transfer: float, timeline: Timeline) -> None:
    ended, started, work = {}, {}, [0.0] * plan.degree
    for rank, busy in enumerate(timeline.ranks):
        for before, after in pairwise(busy):
            assert before.end <= after.start
        for action, start, end in busy:
            assert action.stage in plan.stages_of(rank)
            key = ("input" if action.kind == "backward" else action.kind, action.stage, action.micro_batch)
            assert key not in ended
            started[key], ended[key] = start, end
            work[rank] += end - start
    micro = range(plan.micro_batches)
    assert {key[1:] for key in ended if key[0] == "forward"} == {
        (s, m) for s in range(plan.stages) for m in micro
    }
    assert {key[1:] for key in ended if key[0] == "input"} == {
        (s, m) for s in range(plan.stages) for m in micro
    }
    homes = {stage: rank for rank in range(plan.degree) for stage in plan.stages_of(rank)}
    for (kind, stage, index), start in started.items():
        beside = stage - 1 if kind == "forward" else stage + 1
        if kind != "weight" and 0 <= beside < plan.stages:
            delay = transfer if homes[beside] != homes[stage] else 0.0
            assert start >= ended[kind, beside, index] + delay
        if kind != "forward":
            assert start >= ended["forward" if kind == "input" else "input", stage, index]
    for rank, total in enumerate(work):
        due = sum(costs[stage].total for stage in plan.stages_of(rank)) * plan.micro_batches
        assert total == pytest.approx(due)


@given(st.integers(2, 4), st.integers(1, 3), st.data())
def test_nothing_starts_before_what_it_needs(degree: int, rounds: int, data: st.DataObject) -> None:
    time = st.floats(0.1, 3.0)
    transfer = data.draw(st.floats(0.0, 1.0))
    for plan in plans(degree, 2 * degree * rounds):
        costs = [Cost(*data.draw(st.tuples(time, time, time))) for _ in range(plan.stages)]
        assert_sound(plan, costs, transfer, simulate(plan, costs, transfer))


@given(st.sampled_from(list(SCHEDULE_KINDS)), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12))
def test_a_plan_without_violations_runs(name, degree: int, chunks: int, micro_batches: int) -> None:
    plan = PipelinePlan(name, degree, chunks, micro_batches)
    violations = plan_violations(plan)
    # torch refuses by itself micro-batches of its own schedules alone.
    is_of_torch = {violation.key for violation in violations} == {"train.micro_batch"} and name != "1f1b"
    assume(not violations or is_of_torch)
    if not violations:
        done = [action for actions in action_order(plan) for action in actions if action.kind == "forward"]
        assert len(done) == plan.stages * micro_batches
    else:
        with pytest.raises(ValueError, match="microbatches"):
            action_order(plan)


def test_violations_name_the_key_and_what_is_legal() -> None:
    found = {v.key: v.message for v in plan_violations(PipelinePlan("dualpipe_v", 1, 3, 2))}
    assert "2 ranks or more; found 1" in found["parallel.pp"]
    assert "runs 2 stages per rank; found 3" in found["parallel.pp_chunks"]
    (violation,) = plan_violations(PipelinePlan("interleaved", 4, 2, 9))
    assert violation.key == "train.micro_batch"
    assert "found 9, use 8 or 12" in violation.message
    (violation,) = plan_violations(PipelinePlan("1f1b", 4, 1, 3))
    assert "needs 4 micro-batches or more; found 3" in violation.message
