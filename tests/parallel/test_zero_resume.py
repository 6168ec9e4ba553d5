"""DeepSpeed's ZeRO in bf16, begun from weights of elsewhere, some frozen: scored, stopped and gone on."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from data.loader import Loader
from model.hf.files import HubDirectory
from model.hf.pretrained import save_pretrained
from model.language_model import LanguageModel
from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from parallel.shard.shard_map import TensorSlice
from parallel.shard.shard_view import GlobalShardView
from tests.architectures import random_model
from tests.closeness import FACTOR, distance
from tests.parallel.equality import config_of, laid_out
from tests.parallel.test_zero import FORMS, with_zero
from tests.parallel.truth import exactly
from tests.worlds import run_world
from train.checkpoint.store import CheckpointStore
from train.config.environment import prepare_deepspeed
from train.config.run_config import RunConfig
from train.eval.heldout import evaluate
from train.loop.initial_weights import start_from
from train.loop.run import build_state, open_data, resume, save
from train.loop.state import TrainState
from train.loop.step import StepResult, train_step

BEFORE, AFTER = 2, 2  # steps before and after the save
FROZEN = "blocks.0.mixer."
# What a checkpoint or a start could forget shows: draws of dropout, biases of experts, a table used twice.
KEYS = (
    *("moe=sigmoid", "moe.bias_rate=0.05", "model.has_tied_embeddings=true", "model.mtp.depth=1"),
    *(f"optim.lr_scales={{*norm*:0.5,{FROZEN}*:0.0}}", "residual.dropout=0.1", "train.steps=9"),
)
# One process makes what all look at.
pytestmark = [pytest.mark.prove, pytest.mark.xdist_group("zero resumed")]
PLAIN, TRUE, WIDE, NARROW = "one process", "fsdp in float64", "fsdp in float32", "fsdp in bfloat16"

Part = tuple[str, TensorSlice, Tensor]


class Trace(NamedTuple):
    """What one rank saw of a run that begins from weights.

    began is the held-out loss before the first step. whole are losses and norms of all steps, scored in
    between; stopped are those of the run that was saved, built anew and not scored. parts are the weights
    that this rank kept at the start, at the save, at the end, and at the end of the stopped run.
    """

    began: float
    whole: list[tuple[float, float]]
    stopped: list[tuple[float, float]]
    parts: list[list[Part]]


def trace(world: World, config: RunConfig, given: Path, directory: Path) -> Trace:
    """Trains, saves and trains on; then does the same from the save."""
    state, loader = build_state(config, world), open_data(config, world.rank)
    start_from(state.built, HubDirectory(given), ())
    began, parts = held_out(state, loader, world), [parts_of(state)]
    whole = train(state, loader, config, world, BEFORE)
    store = CheckpointStore(directory, keep=2, rank=world.rank, size=world.size)
    save(state, store, loader, world)
    parts.append(parts_of(state))
    held_out(state, loader, world)
    whole += train(state, loader, config, world, AFTER)
    parts.append(parts_of(state))
    state = build_state(config, world)
    assert resume(state, store, loader, world)
    stopped = whole[:BEFORE] + train(state, loader, config, world, AFTER)
    return Trace(began, whole, stopped, [*parts, parts_of(state)])


def train(
    state: TrainState, loader: Loader, config: RunConfig, world: World, count: int
) -> list[tuple[float, float]]:
    """Losses and norms of so many steps."""
    rows, _ = config.rank_rows(world.axes.batch.size)
    found: list[StepResult] = []
    for _ in range(count):
        batch = loader.batch(state.cursor + world.axes.batch.rank * rows, rows)
        found.append(train_step(state, batch, config, world))
        assert not found[-1].is_skipped
    return [(step.loss, step.grad_norm) for step in found]


def held_out(state: TrainState, loader: Loader, world: World) -> float:
    """Loss of five windows, so that a rank of two has none in the last round."""
    return evaluate(state.built.runner, loader, world, rows=5, micro_batch=1, mtp_depth=1).loss


def parts_of(state: TrainState) -> list[Part]:
    """The weights that this rank keeps, and where they lie in the whole."""
    values, found = state.built.state(), []
    for name in state.built.shard_maps:
        kept = state.built.checkpoint_view(name, values[name].detach())
        if isinstance(kept, GlobalShardView):
            found += [(name, piece, block.clone()) for block, piece in kept.blocks.values()]
        else:
            corner = (0,) * kept.ndim
            found.append((name, TensorSlice(corner, corner, tuple(kept.shape)), kept.clone()))
    return found


def traces(
    rank: int, size: int, configs: Mapping[str, RunConfig], given: Path, directory: Path
) -> dict[str, Trace]:
    """One trace after the other, in processes that import DeepSpeed once."""
    prepare_deepspeed(rank)
    degrees = Degrees(dp_shard=size)
    world = World(rank, size, torch.device("cpu"), open_axes(degrees, rank))
    return {
        name: trace(world, laid_out(config, degrees), given, directory / name)
        for name, config in configs.items()
    }


class Seen(NamedTuple):
    """All traces, those of two ranks by rank, the weights that they began from, and where they saved."""

    alone: Trace
    ranks: list[dict[str, Trace]]
    given: dict[str, Tensor]
    config: RunConfig
    directory: Path


@pytest.fixture(scope="module")
def seen(short_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    wide = config_of("gdn attn", "float32", short_documents, *KEYS)
    config = config_of("gdn attn", "float32", short_documents, *KEYS, "precision=bf16")
    root = tmp_path_factory.mktemp("zero")
    torch.manual_seed(0)
    model = random_model(config.architecture, torch.float32)
    save_pretrained(model, root / "given", model_type="weft")
    (alone,) = run_world(1, traces, {PLAIN: config}, root / "given", root)
    configs = {TRUE: exactly(wide), WIDE: wide, NARROW: config}
    configs |= {**{name: with_zero(config, form) for name, form in FORMS.items()}}
    ranks = run_world(2, traces, configs, root / "given", root, timeout=300)
    return Seen(alone[PLAIN], ranks, dict(model.state_dict()), config, root)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_begins_from_the_weights_of_one_process(seen: Seen, form: str) -> None:
    for rank in seen.ranks:
        # Rows are scored one at a time, so that bf16 rounds as on one process; their sums are of float64.
        assert rank[form].began == pytest.approx(seen.alone.began, rel=1e-12)
    assert_tiles(seen.given, [rank[form].parts[0] for rank in seen.ranks])


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_run_goes_on_bit_for_bit(seen: Seen, form: str) -> None:
    for rank in seen.ranks:
        found = rank[form]
        assert found.stopped == found.whole == seen.ranks[0][form].whole
        for (name, _, weight), (_, _, again) in zip(*found.parts[2:], strict=True):
            assert torch.equal(weight, again), name


@pytest.mark.parametrize("form", FORMS)
def test_zero_rounds_as_fsdp_does(seen: Seen, form: str) -> None:
    true, wide, narrow, found = (results(seen, name) for name in (TRUE, WIDE, NARROW, form))
    for what, expected in true.items():
        # Two draws of the same roundings are about as far off: those of FSDP in bfloat16, not in float32.
        far = distance(found[what], expected)
        assert far <= FACTOR * distance(narrow[what], expected), what
        assert far > FACTOR * distance(wide[what], expected), f"{what}: computed in float32"


def results(seen: Seen, name: str) -> dict[str, Tensor]:
    """Losses and norms of all steps, and the last weights in a row."""
    weights = {key: torch.zeros_like(whole, dtype=torch.float64) for key, whole in seen.given.items()}
    for key, piece, part in (part for rank in seen.ranks for part in rank[name].parts[2]):
        piece.global_view(weights[key]).copy_(part)
    losses, norms = torch.tensor(seen.ranks[0][name].whole, dtype=torch.float64).T
    return {
        "losses": losses,
        "norms": norms,
        "weights": torch.cat([whole.flatten() for whole in weights.values()]),
    }


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_hold_the_wide_weights_and_the_frozen_ones_as_they_were(seen: Seen, form: str) -> None:
    model = LanguageModel(seen.config.architecture, torch.bfloat16)
    store = CheckpointStore(seen.directory / form, keep=2)
    # A checkpoint with other dtypes than this model's is refused.
    loaded = store.load_latest({"model": model.state_dict()}, partial=("model",), read_only=True)
    assert loaded is not None
    assert loaded.step == BEFORE
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert {parameter.dtype for parameter in state.values()} == {torch.float32}
    assert_tiles(state, [rank[form].parts[1] for rank in seen.ranks])
    for name, parameter in state.items():
        is_frozen = name.startswith(FROZEN)
        assert torch.equal(parameter, seen.given[name]) == is_frozen, name
        assert not torch.equal(parameter, parameter.bfloat16().float()), name


def assert_tiles(wholes: Mapping[str, Tensor], ranks: list[list[Part]]) -> None:
    """Asserts that the parts of all ranks are those of wholes, and leave no number out."""
    covered = {name: torch.zeros_like(whole) for name, whole in wholes.items()}
    for name, piece, part in (part for parts in ranks for part in parts):
        assert torch.equal(part, piece.global_view(wholes[name])), name
        piece.global_view(covered[name]).fill_(1)
    for name in {name for parts in ranks for name, _, _ in parts}:
        assert covered[name].all(), name
