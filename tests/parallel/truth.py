"""Runs in float64 that runs in float32 round: how far these may be from them after some steps of training.

The weights that a run begins from are its inputs: with these moved by an eps of float32, one process in
float64 says how far rounding takes every loss, gradient and weight. Ranks in float32 are held to that and not
to one process in float32, whose rounding depends on the processor.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.config.degrees import Degrees
from tests.closeness import DRAWS, FACTOR, assert_within, limits_of
from tests.parallel.equality import Job, Run, on_rank, wholes_of
from tests.worlds import run_world
from train.config.fields import PrecisionConfig
from train.config.run_config import RunConfig

FLOAT64 = PrecisionConfig(compute="float64", parameters="float64")
# The run itself, then those from moved weights.
TURNS = (None, *range(DRAWS))
SEEDS = 8

# Tensors of some kinds, such as weights, by name.
Kinds = Mapping[str, Mapping[str, Tensor]]


class Truth(NamedTuple):
    """What float64 gives, and how far each tensor may be from it."""

    kinds: Kinds
    limits: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, turns: Iterable[Kinds], dtype: torch.dtype = torch.float32) -> "Truth":
        """From the kinds of all TURNS."""
        true, *moved = turns
        assert len(moved) == DRAWS, f"{len(moved)} runs from moved weights"
        limits = {
            kind: limits_of([*named.values()], [[*turn[kind].values()] for turn in moved], dtype)
            for kind, named in true.items()
        }
        return cls(true, limits)

    def check(self, found: Kinds, said: object = "") -> None:
        """Raises AssertionError where something is farther off than rounding takes it."""
        assert found.keys() == self.kinds.keys()
        for kind, true in self.kinds.items():
            assert found[kind].keys() == true.keys(), f"{said} {kind}"
            names = [f"{said} {kind}: {name}" for name in true]
            parts = [found[kind][name] for name in true]
            assert_within(parts, [*true.values()], self.limits[kind], names=names)


class TrueRun(NamedTuple):
    """The truth of a run of some steps, and what its ranks must have exactly as it has it."""

    run: Run
    truth: Truth

    def check(self, ranks: Sequence[Run], said: object = "") -> None:
        """Raises AssertionError where ranks saw other samples or loads, or are farther off than rounding."""
        for rank in ranks:
            assert rank.samples == self.run.samples, f"{said}: sample ids differ"
            pairs = zip(rank.loads, self.run.loads, strict=True)
            assert all(torch.equal(a.double(), b.double()) for a, b in pairs), f"{said}: loads differ"
            assert rank.numbers == ranks[0].numbers, f"{said}: ranks report different losses"
        self.truth.check(kinds_of(ranks, self.run), said)


def exactly(config: RunConfig) -> RunConfig:
    """The config in float64, without DeepSpeed."""
    parallel = config.parallel.model_copy(update={"data": "fsdp"})
    return config.model_copy(update={"precision": FLOAT64, "parallel": parallel})


def decided(configs: Sequence[RunConfig], timeout: float = 120) -> list[RunConfig]:
    """The configs, with seeds of data by which rounding turns no choice of an expert."""
    found = dict(enumerate(configs))
    open_ones = list(found)
    for _ in range(SEEDS):
        moves = [(None, 1.0), *((draw, FACTOR) for draw in range(DRAWS))]
        jobs = [
            Job(exactly(found[index]), Degrees(), moved=draw, by=by)
            for index in open_ones
            for draw, by in moves
        ]
        (runs,) = run_world(1, on_rank, jobs, timeout=timeout)
        for index in list(open_ones):
            run, *moved = runs[: len(moves)]
            del runs[: len(moves)]
            if have_equal_loads(run, moved):
                open_ones.remove(index)
            else:
                train = found[index].train
                update = {"train": train.model_copy(update={"seed": train.seed + 1})}
                found[index] = found[index].model_copy(update=update)
        if not open_ones:
            return [*found.values()]
    raise AssertionError(
        f"{len(open_ones)} of {len(configs)} models turn a choice with each of {SEEDS} seeds"
    )


def have_equal_loads(run: Run, others: Sequence[Run]) -> bool:
    return all(torch.equal(a, b) for other in others for a, b in zip(other.loads, run.loads, strict=True))


def true_runs(configs: Sequence[RunConfig], timeout: float = 120) -> list[TrueRun]:
    """One process in float64, for each config."""
    jobs = [Job(exactly(config), Degrees(), moved=turn) for config in configs for turn in TURNS]
    (runs,) = run_world(1, on_rank, jobs, timeout=timeout)
    groups = [runs[start : start + len(TURNS)] for start in range(0, len(runs), len(TURNS))]
    for run, *moved in groups:
        assert have_equal_loads(run, moved), "a choice is so narrow that rounding turns it"
    return [TrueRun(group[0], Truth.of(kinds_of([run], group[0]) for run in group)) for group in groups]


def kinds_of(ranks: Sequence[Run], like: Run) -> Kinds:
    """What one run or all ranks of it found; tensors have the shapes of `like`."""
    numbers = ranks[0].numbers
    names = numbers[0].keys()
    assert all(line.keys() == names for line in numbers), "losses are missing"
    found = {"numbers": {name: as_tensor(line[name] for line in numbers) for name in names}}
    for kind in ("weight", "moment"):
        found[kind] = dict(wholes_of(like, ranks, kind))
    return found | {"bias": ranks[0].biases}


def as_tensor(numbers: Iterable[float]) -> Tensor:
    """A row of float64."""
    return torch.tensor([*numbers], dtype=torch.float64)
