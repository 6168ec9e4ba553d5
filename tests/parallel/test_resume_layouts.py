"""A run that is saved in one layout goes on in another as if nothing had been."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from tests.parallel.equality import LIMIT, config_of, fill, laid_out, move
from tests.parallel.truth import TURNS, Kinds, Truth, as_tensor, exactly
from tests.train.runs import forget
from tests.worlds import run_world
from train.checkpoint.store import CheckpointStore
from train.config.run_config import RunConfig
from train.loop.metrics import digest_samples
from train.loop.run import build_state, open_data, resume, save
from train.loop.step import train_step

# Each takes the run on from the one before: every axis comes and goes.
CHAIN = (
    Degrees(),
    Degrees(dp_shard=2, ep=2),
    Degrees(tp=2),
    Degrees(cp=2),
    Degrees(pp=2, dp_shard=2, ep=2),
    Degrees(cp=2, tp=2, ep=4),
    Degrees(),
    Degrees(pp=2, tp=2),
    Degrees(cp=2, tp=2, ep=2),
    Degrees(dp_replicate=2, dp_shard=2, ep=2),
    Degrees(tp=2, ep=2),
)
EACH = 1  # steps in a layout
# One rank has both ends of the pipeline, and so the shared table twice.
TIED = (
    *("model.has_tied_embeddings=true", "parallel.pp_schedule=zero_bubble_v", "model.mtp.depth=1"),
    *("residual=hyper", "model.depth=4"),
)


class Step(NamedTuple):
    """What a step saw."""

    loss: float
    norm: float
    samples: str


def go_on(
    rank: int,
    size: int,
    config: RunConfig,
    degrees: Degrees,
    directory: Path,
    until: int,
    forgets: str = "",
    moved: int | None = None,
) -> list[Step]:
    """Trains from the newest checkpoint to the end of a step, and saves.

    moved: the draw by which the first weights go up or down by an eps of float32; on one process alone.
    """
    if forgets:
        forget(forgets)
    config = laid_out(config, degrees)
    world = World(rank, size, torch.device("cpu"), open_axes(degrees, rank))
    loader, state = open_data(config, rank), build_state(config, world)
    fill(state, config)
    move(state, moved)
    store = CheckpointStore(directory, keep=2, rank=rank, size=size)
    resumed_from = resume(state, store, loader, world)
    assert (resumed_from is not None) == directory.exists()
    rows, _ = config.rank_rows(world.axes.batch.size)
    steps = []
    while state.step < until:
        batch = loader.batch(state.cursor + world.axes.batch.rank * rows, rows)
        samples = digest_samples(batch, world)
        result = train_step(state, batch, config, world)
        steps.append(Step(result.loss, result.grad_norm, samples))
    save(state, store, loader, world)
    return steps


def turns(rank: int, size: int, config: RunConfig, directory: Path, until: int) -> list[list[Step]]:
    """The steps of one process that is never stopped, and those from moved weights."""
    return [go_on(rank, size, config, Degrees(), directory / str(turn), until, moved=turn) for turn in TURNS]


class TrueSteps(NamedTuple):
    """What float64 gives on one process, step by step, and how far float32 may be from it."""

    samples: list[str]
    truth: Truth

    def check(self, steps: Sequence[Step]) -> None:
        """Raises AssertionError where samples are others, or losses or norms too far off."""
        assert [step.samples for step in steps] == self.samples
        self.truth.check(kinds_of(steps))


def true_steps(config: RunConfig, directory: Path, until: int) -> TrueSteps:
    """For the first steps of a config in float32."""
    (found,) = run_world(1, turns, exactly(config), directory, until)
    return TrueSteps([step.samples for step in found[0]], Truth.of(map(kinds_of, found)))


def kinds_of(steps: Sequence[Step]) -> Kinds:
    """Losses and norms of all steps."""
    return {name: {name: as_tensor(getattr(step, name) for step in steps)} for name in ("loss", "norm")}


def chain_of(dataset: Path, precision: str) -> RunConfig:
    steps = f"train.steps={EACH * len(CHAIN) + 1}"
    return config_of("gdn attn mamba2 dsa", precision, dataset, "model.depth=4", steps)


@pytest.fixture(scope="module")
def config(short_documents: Path) -> RunConfig:
    return chain_of(short_documents, "float64")


@pytest.fixture(scope="module")
def uninterrupted(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    directory = tmp_path_factory.mktemp("one") / "checkpoints"
    (steps,) = run_world(1, go_on, config, Degrees(), directory, EACH * len(CHAIN))
    return steps


@pytest.mark.prove
def test_a_run_goes_on_in_any_other_layout(
    config: RunConfig, uninterrupted: list[Step], tmp_path: Path
) -> None:
    check_chain(config, CHAIN, uninterrupted, tmp_path / "checkpoints")


@pytest.mark.prove
def test_a_run_in_float32_goes_on_in_any_other_layout(short_documents: Path, tmp_path: Path) -> None:
    config = chain_of(short_documents, "float32")
    true = true_steps(config, tmp_path / "true", EACH * len(CHAIN))
    found = [step for steps in chained(config, CHAIN, tmp_path / "checkpoints") for step in steps]
    true.check(found)


@pytest.mark.parametrize("forgets", ["", "twins"])
def test_a_table_at_both_ends_of_a_pipeline_goes_on(
    short_documents: Path, tmp_path: Path, forgets: str
) -> None:
    # What the second table has of moments shows in its weights after a step, and in the loss of the next.
    chain, each = (Degrees(pp=2), Degrees(), Degrees(pp=2)), 2
    config = config_of("gdn attn", "float64", short_documents, f"train.steps={3 * each + 1}", *TIED)
    (steps,) = run_world(1, go_on, config, Degrees(), tmp_path / "one", 3 * each)
    if not forgets:
        check_chain(config, chain, steps, tmp_path / "checkpoints", each=each)
        return
    with pytest.raises(AssertionError):
        check_chain(config, chain, steps, tmp_path / "checkpoints", forgets, each=each)


def check_chain(
    config: RunConfig,
    chain: Sequence[Degrees],
    expected: list[Step],
    directory: Path,
    forgets: str = "",
    each: int = EACH,
) -> None:
    for turn, found in enumerate(chained(config, chain, directory, forgets, each)):
        for step, other in zip(found, expected[each * turn : each * (turn + 1)], strict=True):
            assert step.samples == other.samples, chain[turn]
            assert step.loss == pytest.approx(other.loss, rel=LIMIT), chain[turn]
            # The norm sums squares of gradients of all sizes, through all steps before.
            assert step.norm == pytest.approx(other.norm, rel=10 * LIMIT), chain[turn]


def chained(
    config: RunConfig, chain: Sequence[Degrees], directory: Path, forgets: str = "", each: int = EACH
) -> Iterator[list[Step]]:
    """The steps of each layout in turn."""
    for turn, degrees in enumerate(chain):
        until = each * (turn + 1)
        ranks = run_world(degrees.size, go_on, config, degrees, directory, until, forgets)
        assert all(steps == ranks[0] for steps in ranks)
        yield ranks[0]


@pytest.mark.parametrize("what", ["cursor", "optimizer", "bias"])
def test_what_is_forgotten_on_the_way_shows(
    config: RunConfig, uninterrupted: list[Step], tmp_path: Path, what: str
) -> None:
    directory = tmp_path / "checkpoints"
    run_world(1, go_on, config, Degrees(), directory, EACH)
    steps, _ = run_world(2, go_on, config, Degrees(tp=2), directory, 3 * EACH, what)
    worst = max(
        abs(found.loss - expected.loss) / expected.loss
        for found, expected in zip(steps, uninterrupted[EACH:], strict=False)
    )
    assert worst > 1e-6
