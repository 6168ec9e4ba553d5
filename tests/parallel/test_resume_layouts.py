"""A run that is saved in one layout goes on in another as if nothing had been."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from parallel.axes import open_axes
from parallel.degrees import Degrees
from parallel.world import World
from tests.parallel.equality import LIMITS, config_of, fill, laid_out
from tests.train.runs import forget
from tests.worlds import run_world
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.run import build_state, digest_samples, open_data, resume, save
from train.step import train_step

# Each takes the run on from the one before: data, expert, tensor and context parallelism come and go.
CHAIN = (
    Degrees(),
    Degrees(dp_shard=2, ep=2),
    Degrees(tp=2),
    Degrees(cp=2),
    Degrees(cp=2, tp=2, ep=4),
    Degrees(),
    Degrees(cp=2, tp=2, ep=2),
    Degrees(dp_replicate=2, dp_shard=2, ep=2),
    Degrees(tp=2, ep=2),
)
EACH = 2  # steps in a layout


class Step(NamedTuple):
    """What a step saw."""

    loss: float
    norm: float
    samples: str


def go_on(
    rank: int, size: int, config: RunConfig, degrees: Degrees, directory: Path, until: int, forgets: str = ""
) -> list[Step]:
    """Trains from the newest checkpoint to the end of a step, and saves."""
    if forgets:
        forget(forgets)
    config = laid_out(config, degrees)
    world = World(rank, size, torch.device("cpu"), open_axes(degrees, rank))
    loader, state = open_data(config, rank), build_state(config, world)
    fill(state, config)
    store = CheckpointStore(directory, keep=2, rank=rank, size=size)
    is_resumed = resume(state, store, loader, world)
    assert is_resumed == directory.exists()
    rows, _ = config.rank_rows(world.axes.rows.size)
    steps = []
    while state.step < until:
        batch = loader.batch(state.cursor + world.axes.rows.rank * rows, rows)
        samples = digest_samples(batch, world)
        result = train_step(state, batch, config, world)
        steps.append(Step(result.loss, result.grad_norm, samples))
    save(state, store, loader, world)
    return steps


@pytest.fixture(scope="module", params=LIMITS)
def config(request: pytest.FixtureRequest, short_documents: Path) -> RunConfig:
    steps = f"train.steps={EACH * len(CHAIN) + 1}"
    return config_of("gdn attn mamba2 dsa", request.param, short_documents, "model.depth=4", steps)


@pytest.fixture(scope="module")
def uninterrupted(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    directory = tmp_path_factory.mktemp("one") / "checkpoints"
    (steps,) = run_world(1, go_on, config, Degrees(), directory, EACH * len(CHAIN))
    return steps


def test_a_run_goes_on_in_any_other_layout(
    config: RunConfig, uninterrupted: list[Step], tmp_path: Path
) -> None:
    limit = LIMITS[config.precision.compute]
    for turn, degrees in enumerate(CHAIN):
        until = EACH * (turn + 1)
        ranks = run_world(degrees.size, go_on, config, degrees, tmp_path / "checkpoints", until)
        assert all(steps == ranks[0] for steps in ranks)
        for step, found in enumerate(ranks[0], EACH * turn):
            expected = uninterrupted[step]
            assert found.samples == expected.samples, (degrees, step)
            assert found.loss == pytest.approx(expected.loss, rel=limit), (degrees, step)
            # The norm sums squares of gradients of all sizes, through all steps before.
            assert found.norm == pytest.approx(expected.norm, rel=10 * limit), (degrees, step)


@pytest.mark.parametrize("what", ["cursor", "optimizer", "bias"])
def test_what_is_forgotten_on_the_way_shows(
    config: RunConfig, uninterrupted: list[Step], tmp_path: Path, what: str
) -> None:
    if config.precision.compute != "float64":
        return  # one precision tells
    directory = tmp_path / "checkpoints"
    run_world(1, go_on, config, Degrees(), directory, EACH)
    steps, _ = run_world(2, go_on, config, Degrees(tp=2), directory, 3 * EACH, what)
    worst = max(
        abs(found.loss - expected.loss) / expected.loss
        for found, expected in zip(steps, uninterrupted[EACH:], strict=False)
    )
    assert worst > 1e-6
