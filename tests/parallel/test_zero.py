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
from tests.parallel.equality import Job, Run, compare, config_of, laid_out, on_rank, run
from tests.parallel.test_resume_layouts import Step, go_on
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
LIMIT = 1e-5


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


def score(config: RunConfig, world: World) -> tuple[float, torch.Tensor]:
    """Held-out loss of the first values, and their logits after some tokens."""
    config = laid_out(config, TWO)
    runner = build_state(config, world).built.runner
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


@pytest.fixture(scope="module")
def alone(config: RunConfig) -> Run:
    (runs,) = run_world(1, on_rank, [Job(config, ALONE)])
    return runs[0]


@pytest.fixture(scope="module")
def chained(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chain") / "checkpoints"
    run_world(1, go_on, config, ALONE, directory, 1)
    return directory


@pytest.fixture(scope="module")
def seen(config: RunConfig, chained: Path) -> list[Seen]:
    return run_world(2, all_forms, config, chained, timeout=300)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_equal_one_process(alone: Run, seen: list[Seen], form: str) -> None:
    apart = compare(alone, [rank.runs[form] for rank in seen])
    assert max(apart.loss, apart.norm, apart.weight) < LIMIT, apart
    assert apart.gradient < 3 * LIMIT, apart


def test_a_run_goes_from_one_process_through_every_form_and_back(
    config: RunConfig, chained: Path, seen: list[Seen], tmp_path: Path
) -> None:
    (expected,) = run_world(1, go_on, config, ALONE, tmp_path / "one", 7)
    (last,) = run_world(1, go_on, config, ALONE, chained, 7)
    found = [*seen[0].chain, *last]
    assert seen[0].chain == seen[1].chain
    assert len(found) == 6
    for step, other in zip(found, expected[1:], strict=True):
        assert step.samples == other.samples
        assert step.loss == pytest.approx(other.loss, rel=LIMIT)
        assert step.norm == pytest.approx(other.norm, rel=10 * LIMIT)


def test_held_out_losses_are_those_of_fsdp(seen: list[Seen]) -> None:
    fsdp, *zero = seen[0].held_out
    assert zero == pytest.approx([fsdp] * len(FORMS), rel=1e-6)


def test_logits_of_the_next_token_are_those_of_fsdp(seen: list[Seen]) -> None:
    for rank in seen:
        fsdp, *zero = rank.logits
        assert fsdp.std() > 0
        assert len(zero) == len(FORMS)
        for logits in zero:
            # As far apart as losses may be; where terms cancel, of the largest of them.
            torch.testing.assert_close(logits, fsdp, rtol=0, atol=LIMIT * float(fsdp.abs().max()))


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
