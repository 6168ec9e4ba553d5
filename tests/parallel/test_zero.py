"""DeepSpeed's ZeRO: the losses, weights and moments of one process, checkpoints for any other layout."""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from parallel.config.degrees import Degrees
from parallel.config.zero import ZeroConfig
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from parallel.next_token import next_logits
from parallel.shard.shard_view import GlobalShardView, flat_slices
from tests.parallel.equality import Job, Run, config_of, laid_out, move, run
from tests.parallel.test_resume_layouts import Step, go_on, true_steps
from tests.parallel.truth import TURNS, Kinds, TrueRun, Truth, as_tensor, exactly, true_runs
from tests.worlds import run_world
from train.config.environment import prepare_deepspeed
from train.config.run_config import RunConfig
from train.eval.heldout import evaluate
from train.loop.run import build_state, open_data
from train.loop.step import train_step

ALONE, TWO = Degrees(), Degrees(dp_shard=2)
FORMS = {
    "stage 1": ZeroConfig(stage=1, offload="none", whole_below=0),
    "stage 2, optimizer on the host": ZeroConfig(stage=2, offload="optimizer", whole_below=0),
    "stage 3": ZeroConfig(stage=3, offload="none", whole_below=0),
    "stage 3, all on the host, small ones whole": ZeroConfig(stage=3, offload="parameters", whole_below=600),
}
# A router with a bias, groups with and without decay, and a table that embeds and scores.
KEYS = ("moe=sigmoid", "moe.num_experts=8", "moe.bias_rate=0.05", "model.has_tied_embeddings=true")


class Seen(NamedTuple):
    """What the ranks saw: runs by form, steps of the chain, held-out losses and logits, steps after NaN."""

    runs: dict[str, Run]
    chain: list[Step]
    held_out: list[float]
    logits: list[torch.Tensor]
    skipped: list[bool]


def with_zero(config: RunConfig, zero: ZeroConfig | None) -> RunConfig:
    """The config with DeepSpeed instead of FSDP2."""
    settings = {} if zero is None else {"data": "zero", "zero": zero}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=settings)})


def all_forms(rank: int, size: int, config: RunConfig, directory: Path) -> Seen:
    """Everything that two ranks are asked, in processes that import DeepSpeed once."""
    prepare_deepspeed(rank)
    world = World(rank, size, torch.device("cpu"), open_axes(TWO, rank))
    runs = {name: run(Job(with_zero(config, form), TWO), world) for name, form in FORMS.items()}
    chain = []
    for until, form in enumerate((*list(FORMS.values())[1:], None, FORMS["stage 1"]), 2):
        chain += go_on(rank, size, with_zero(config, form), TWO, directory, until)
    found = [score(with_zero(config, form), world) for form in (None, *FORMS.values())]
    held_out, logits = zip(*found, strict=True)
    skipped = [skip(with_zero(config, form), world) for form in FORMS.values()]
    return Seen(runs, chain, [*held_out], [*logits], skipped)


def score(config: RunConfig, world: World, moved: int | None = None) -> tuple[float, torch.Tensor]:
    """Held-out loss of the first values, and their logits after some tokens."""
    config = laid_out(config, world.axes.degrees)
    state = build_state(config, world)
    move(state, moved)
    runner = state.built.runner
    held_out = evaluate(runner, open_data(config, world.rank), world, rows=8, micro_batch=1)
    return held_out.loss, next_logits(runner, torch.arange(5, 12), world, config.data.sequence_length)


def skip(config: RunConfig, world: World) -> bool:
    """Whether a step without finite gradients is skipped, and those after it are those of a fresh run."""
    config = laid_out(config, TWO)
    loader, losses = open_data(config, world.rank), []
    rows, _ = config.rank_rows(2)
    for poisons in (True, False):
        state = build_state(config, world)
        batch = loader.batch(world.rank * rows, rows)
        if poisons:
            norm = state.built.parts[0].norm
            assert norm is not None
            handle = norm.register_forward_hook(lambda _, __, x: x * math.nan)
            assert train_step(state, batch, config, world).is_skipped
            handle.remove()
            state.step = 0
        losses += [train_step(state, batch, config, world).loss for _ in range(2)]
    return losses[:2] == losses[2:]


@pytest.fixture(scope="module")
def config(short_documents: Path) -> RunConfig:
    return config_of("gdn attn", "float32", short_documents, *KEYS, "train.steps=9", "optim.weight_decay=0.3")


def true_scores(rank: int, size: int, config: RunConfig) -> list[tuple[float, torch.Tensor]]:
    """Those of one process, and those from moved weights."""
    world = World(rank, size, torch.device("cpu"), open_axes(ALONE, rank))
    return [score(config, world, turn) for turn in TURNS]


def kinds_of(held_out: float, logits: torch.Tensor) -> Kinds:
    return {"loss": {"held out": as_tensor([held_out])}, "logits": {"next": logits}}


@pytest.fixture(scope="module")
def true(config: RunConfig) -> TrueRun:
    return true_runs([config])[0]


@pytest.fixture(scope="module")
def chained(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    directory = tmp_path_factory.mktemp("chain") / "checkpoints"
    (steps,) = run_world(1, go_on, config, ALONE, directory, 1)
    return directory, steps


@pytest.fixture(scope="module")
def seen(config: RunConfig, chained: tuple[Path, list[Step]]) -> list[Seen]:
    return run_world(2, all_forms, config, chained[0], timeout=300)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_equal_one_process(true: TrueRun, seen: list[Seen], form: str) -> None:
    true.check([rank.runs[form] for rank in seen])


def test_a_run_goes_from_one_process_through_every_form_and_back(
    config: RunConfig, chained: tuple[Path, list[Step]], seen: list[Seen], tmp_path: Path
) -> None:
    directory, first = chained
    (last,) = run_world(1, go_on, config, ALONE, directory, 7)
    assert seen[0].chain == seen[1].chain
    assert len(seen[0].chain) == 5
    true_steps(config, tmp_path, 7).check([*first, *seen[0].chain, *last])


def test_scores_and_logits_are_those_of_one_process(config: RunConfig, seen: list[Seen]) -> None:
    (scores,) = run_world(1, true_scores, exactly(config))
    truth = Truth.of(kinds_of(*found) for found in scores)
    assert truth.kinds["logits"]["next"].std() > 0
    for rank in seen:
        for form, *found in zip(("fsdp", *FORMS), rank.held_out, rank.logits, strict=True):
            truth.check(kinds_of(*found), form)


def test_a_step_that_is_not_finite_is_skipped_and_leaves_nothing(seen: list[Seen]) -> None:
    for rank in seen:
        assert rank.skipped == [True] * len(FORMS)


def test_runs_of_numbers_are_blocks_in_their_order() -> None:
    for shape in ((), (5,), (3, 4), (2, 3, 4), (3, 1, 2)):
        whole = torch.arange(math.prod(shape)).view(shape)
        for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
            slices = flat_slices(shape, start, stop)
            taken = [int(x) for piece in slices for x in piece.global_view(whole).reshape(-1)]
            assert taken == list(range(start, stop)), (shape, start, stop)
            assert len({piece.global_offset for piece in slices}) == len(slices) <= max(1, 2 * len(shape) - 1)
            stored = GlobalShardView.of_flat_slice(whole.reshape(-1)[start:stop], start, whole.shape)
            assert all(
                torch.equal(block, piece.global_view(whole)) for block, piece in stored.blocks.values()
            )
