import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.optim.schedules.cosine import CosineConfig
from train.optim.schedules.wsd import WsdConfig

schedules = st.one_of(
    st.builds(
        WsdConfig,
        kind=st.just("wsd"),
        warmup_steps=st.integers(0, 30),
        decay_fraction=st.floats(0.01, 1.0),
        floor=st.floats(0, 1),
    ),
    st.builds(CosineConfig, kind=st.just("cosine"), warmup_steps=st.integers(0, 30), floor=st.floats(0, 1)),
)


@given(schedule=schedules, steps=st.integers(1, 200))
def test_rises_to_the_peak_and_falls_to_the_floor(schedule, steps: int) -> None:
    factors = [schedule.factor(step, steps) for step in range(steps)]
    warm = min(schedule.warmup_steps, steps)
    assert all(0 < factor <= 1 for factor in factors[:warm])
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    assert all(schedule.floor <= factor <= 1 for factor in factors[warm:])
    if steps > schedule.warmup_steps:
        assert math.isclose(max(factors), 1.0)


@given(schedule=schedules, steps=st.integers(1, 200))
def test_says_where_the_peak_or_a_part_of_the_decay_is_missing(schedule, steps: int) -> None:
    peak = max(schedule.factor(step, steps) for step in range(steps))
    falls = range(schedule.warmup_steps, steps)
    is_short = peak < 1 - 1e-9 or not falls
    if isinstance(schedule, WsdConfig):
        is_short |= len(falls) < round(schedule.decay_fraction * steps)
    assert bool(schedule.cautions(steps)) == is_short


def test_shapes_are_the_published_ones() -> None:
    wsd = WsdConfig(kind="wsd", warmup_steps=10, decay_fraction=0.4, floor=0.1)
    assert wsd.factor(0, 100) == 0.1
    assert wsd.factor(9, 100) == wsd.factor(59, 100) == wsd.factor(60, 100) == 1.0
    assert math.isclose(wsd.factor(70, 100), 0.1 + 0.9 * (1 - math.sqrt(10 / 40)))
    # Half of ten steps would begin within eight of warm-up: the decay is then what is left.
    late = WsdConfig(kind="wsd", warmup_steps=8, decay_fraction=0.5, floor=0.0)
    assert late.factor(7, 10) == late.factor(8, 10) == 1.0
    assert math.isclose(late.factor(9, 10), 1 - math.sqrt(1 / 2))
    cosine = CosineConfig(kind="cosine", warmup_steps=0, floor=0.2)
    assert math.isclose(cosine.factor(50, 100), 0.6)
    assert math.isclose(cosine.factor(25, 100), 0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5)))


def test_half_a_cosine_spans_what_warm_up_leaves() -> None:
    cosine = CosineConfig(kind="cosine", warmup_steps=4, floor=0.2)
    quarter = math.sqrt(0.5)
    expected = {4: 1.0, 6: 0.2 + 0.4 * (1 + quarter), 8: 0.6, 10: 0.2 + 0.4 * (1 - quarter), 12: 0.2}
    assert [cosine.factor(step, 12) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert {step: cosine.factor(step, 12) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_a_decay_that_begins_within_warm_up_takes_the_steps_after_it() -> None:
    # Eight of ten steps would begin at step 2.
    wsd = WsdConfig(kind="wsd", warmup_steps=6, decay_fraction=0.8, floor=0.1)
    rising = [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0]
    falling = [1.0, 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)), 0.1 + 0.9 * (1 - math.sqrt(0.75)), 0.1]
    factors = [wsd.factor(step, 10) for step in range(11)]
    assert factors == pytest.approx(rising + falling, rel=1e-12)
