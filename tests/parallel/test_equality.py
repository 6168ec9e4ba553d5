"""Training in every layout is training on one process, for every mixer: the matrix of docs/parallelism.md."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bench import equality as report
from parallel.config.degrees import Degrees
from tests.parallel.equality import (
    AXES,
    LAYOUTS,
    LIMIT,
    MIXERS,
    PATTERNS,
    PRECISIONS,
    STEPS,
    Apart,
    Job,
    Run,
    compare,
    config_of,
    on_rank,
)
from tests.parallel.truth import TrueRun, decided, true_runs
from tests.worlds import run_world

# Every pair of axes, in little time; the rest is run by `make equality`.
PROVEN = (
    ("float64", "replicate2-shard2-ep2"),
    ("float64", "replicate2-cp2-tp2-ep2"),
    ("float64", "shard2-cp2-tp2-ep4"),
    ("float64", "pp2-shard2-ep2"),
    ("float64", "pp2-cp2-tp2"),
)
CASES = [
    pytest.param(
        precision,
        layout,
        marks=[pytest.mark.equality, *[pytest.mark.prove] * ((precision, layout) in PROVEN)],
        id=f"{precision}-{layout}",
    )
    for precision in PRECISIONS
    for layout in LAYOUTS
]
SECONDS = 580  # of one layout for all mixers


@pytest.fixture(scope="module")
def measured() -> Iterator[report.Measured]:
    """What the tests of the matrix find; written once all of it is there."""
    found: report.Measured = {precision: {} for precision in PRECISIONS}
    yield found
    if all(list(layouts) == list(LAYOUTS) for layouts in found.values()):
        report.write(found, STEPS, LIMIT)


class Alone:
    """Runs of one process, each run once."""

    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self._found: dict[tuple[str, str], tuple[Job, Run]] = {}
        self._true: dict[str, TrueRun] = {}

    def of(self, mixers: Sequence[str], precision: str) -> list[tuple[Job, Run]]:
        """What was run and what it gave, by mixer."""
        missing = [mixer for mixer in mixers if (mixer, precision) not in self._found]
        if missing:
            configs = [config_of(PATTERNS[mixer], precision, self.dataset) for mixer in missing]
            if precision == "float32":
                configs = decided(configs, SECONDS)
            jobs = [Job(config, Degrees()) for config in configs]
            (runs,) = run_world(1, on_rank, jobs, timeout=SECONDS)
            for mixer, job, run in zip(missing, jobs, runs, strict=True):
                self._found[mixer, precision] = (job, run)
        return [self._found[mixer, precision] for mixer in mixers]

    def true(self, mixers: Sequence[str]) -> list[TrueRun]:
        """What runs in float32 round, by mixer; one process in float32 is held to it first."""
        missing = [mixer for mixer in mixers if mixer not in self._true]
        if missing:
            jobs, runs = zip(*self.of(missing, "float32"), strict=True)
            found = true_runs([job.config for job in jobs], SECONDS)
            for mixer, true, run in zip(missing, found, runs, strict=True):
                true.check([run], f"{mixer} on one process")
                self._true[mixer] = true
        return [self._true[mixer] for mixer in mixers]


@pytest.fixture(scope="module")
def alone(short_documents: Path) -> Alone:
    return Alone(short_documents)


def measure(alone: Alone, mixers: Sequence[str], precision: str, layout: str, fault: str = "") -> list[Apart]:
    """How far each mixer is from one process, once it is held to what float64 allows."""
    degrees, expected = LAYOUTS[layout], alone.of(mixers, precision)
    jobs = [job._replace(degrees=degrees, fault=fault) for job, _ in expected]
    ranks = run_world(degrees.size, on_rank, jobs, timeout=SECONDS)
    runs = list(zip(*ranks, strict=True))
    found = [compare(run, found) for (_, run), found in zip(expected, runs, strict=True)]
    if precision == "float64":
        assert not {mixer: far for mixer, far in zip(mixers, found, strict=True) if not far.worst < LIMIT}
    else:
        for mixer, true, ranks in zip(mixers, alone.true(mixers), runs, strict=True):
            true.check(ranks, mixer)
    return found


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize(("precision", "layout"), CASES)
def test_a_layout_trains_as_one_process(
    precision: str, layout: str, alone: Alone, measured: report.Measured
) -> None:
    found = dict(zip(MIXERS, measure(alone, MIXERS, precision, layout), strict=True))
    measured[precision][layout] = {mixer: apart._asdict() for mixer, apart in found.items()}


def test_one_mixer_trains_as_one_process(alone: Alone) -> None:
    measure(alone, ["gdn"], "float64", "cp2")


def test_one_mixer_in_float32_is_float64_rounded(alone: Alone) -> None:
    measure(alone, ["gdn"], "float32", "cp2")


def test_copies_that_are_not_summed_are_seen(alone: Alone) -> None:
    with pytest.raises(AssertionError, match="differ"):
        measure(alone, ["gdn"], "float64", "tp2", fault="gradients of copies")


def test_rows_of_another_rank_are_seen(alone: Alone) -> None:
    with pytest.raises(AssertionError, match="sample ids differ"):
        measure(alone, ["gdn"], "float64", "shard2", fault="rows of the first")


def cut_axes(degrees: Degrees) -> set[str]:
    return {axis for axis in AXES if getattr(degrees, axis) > 1}


def test_every_axis_stands_alone_and_every_pair_together() -> None:
    whole = [cut_axes(degrees) for degrees in LAYOUTS.values()]
    proven = [cut_axes(LAYOUTS[layout]) for _, layout in PROVEN]
    for axis in AXES:
        # Experts are spread over ranks that another axis makes.
        assert {axis} in whole or {axis, "dp_shard"} in whole
    for pair in itertools.combinations(AXES, 2):
        assert any(set(pair) <= axes for axes in whole), pair
        # What a pipeline makes of copies of the weights is left to the whole matrix.
        assert any(set(pair) <= axes for axes in proven) or pair == ("pp", "dp_replicate"), pair
