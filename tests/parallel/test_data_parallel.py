"""Two and four ranks equal one process: losses, gradient norms, updated weights, sample ids."""

from functools import partial
from pathlib import Path

import pytest
import torch

from conf.errors import STOPPED
from tests.closeness import FACTOR
from tests.parallel.true_commands import TrueCommand, true_commands
from tests.train.runs import log_path, metrics_of, model_of, run_to_end, spawn_ranks, wait_for_metrics

STEPS = 20
LIMIT = 1e-12  # float64 leaves rounding of sums in another order


# One process makes the runs that all are compared with.
pytestmark = pytest.mark.xdist_group("data parallel")


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "run"
    assert run_to_end(overrides(corpus, directory)) == 0
    return directory


@pytest.fixture(scope="module")
def true(corpus, tmp_path_factory) -> dict[str, TrueCommand]:
    """What runs in float32 and bfloat16 round."""
    root, dtypes = tmp_path_factory.mktemp("true"), {"fp32": torch.float32, "bf16": torch.bfloat16}
    return dict(zip(dtypes, true_commands(root, partial(overrides, corpus), dtypes.values()), strict=True))


def overrides(corpus, directory: Path, *more: str, precision: str = "fp64") -> list[str]:
    # Dropout draws per rank, so it alone may differ between layouts. At a rate of 0.01 the tiny model is at
    # the edge of divergence, where the rounding of one step grows tenfold in a few more.
    stable = ("residual.dropout=0.0", "optim.lr=0.003")
    fixed = (f"train.steps={STEPS}", f"precision={precision}", *stable)
    return corpus.overrides(directory, *fixed, *more)


def assert_same(directory: Path, reference: Path) -> None:
    ours, theirs = metrics_of(directory), metrics_of(reference)
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    assert len(ours) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=LIMIT), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * LIMIT), a["step"]
        loads = [name for name in a if name.startswith("router/idle")]
        assert [a[name] for name in loads] == [b[name] for name in loads], a["step"]
    weights, reference_weights = (load_weights(path) for path in (directory, reference))
    assert set(weights) == set(reference_weights)
    for name, weight in weights.items():
        reference_weight = reference_weights[name]
        scale = reference_weight.abs().max().clamp(min=1.0)
        assert ((weight - reference_weight).abs().max() / scale).item() <= 100 * LIMIT, name


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    return model_of(directory).state_dict()


LAYOUTS = {
    "expert2-shard4-prefetch": (4, ["parallel.ep=2", "parallel.prefetch=1"]),
    "pipeline2-shard2": (4, ["parallel.pp=2", "train.micro_batch=1"]),
    "context2-tensor2-expert4": (4, ["parallel.cp=2", "parallel.tp=2", "parallel.ep=4"]),
}
MORE_LAYOUTS = {
    "shard2": (2, ["parallel.dp_shard=2"]),
    "replicate2": (2, ["parallel.dp_replicate=2", "parallel.dp_shard=1"]),
    "hybrid4": (4, ["parallel.dp_replicate=2", "train.micro_batch=1"]),
    "shard2-accumulate": (2, ["train.micro_batch=1", "parallel.reshard_after_forward=false"]),
    "accumulate": (1, ["train.micro_batch=1"]),
    "expert2-hybrid": (4, ["parallel.dp_replicate=2", "parallel.ep=2"]),
    "expert2": (2, ["parallel.ep=2"]),
    "expert2of4": (4, ["parallel.ep=2"]),
    "tensor2": (2, ["parallel.tp=2"]),
    "context2": (2, ["parallel.cp=2"]),
    "pipeline2-tensor2": (
        4,
        ["parallel.pp=2", "parallel.pp_schedule=zero_bubble", "parallel.tp=2", "train.micro_batch=1"],
    ),
    "context2-shard2": (4, ["parallel.cp=2", "train.micro_batch=1"]),
}
# Equations are compared in float64; float32 runs the same code, with other dtypes on the way between ranks.
NARROW = (
    *(("fp32", name) for name in ("alone", "hybrid4", "pipeline2-shard2", "context2-tensor2-expert4")),
    ("bf16", "alone"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_equals_one_process(alone, corpus, tmp_path: Path, layout: str) -> None:
    check_layout(alone, corpus, tmp_path, *LAYOUTS[layout])


@pytest.mark.prove
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_more_layouts_equal_one_process(alone, corpus, tmp_path: Path, layout: str) -> None:
    check_layout(alone, corpus, tmp_path, *MORE_LAYOUTS[layout])


def check_layout(alone: Path, corpus, tmp_path: Path, size: int, keys: list[str]) -> None:
    directory = tmp_path / "run"
    assert run_to_end(overrides(corpus, directory, *keys), size) == 0
    assert_same(directory, alone)


@pytest.mark.prove
@pytest.mark.parametrize(("precision", "layout"), NARROW)
def test_lower_precision_is_float64_rounded(
    true, corpus, tmp_path: Path, precision: str, layout: str
) -> None:
    size, keys = ({"alone": (1, [])} | LAYOUTS | MORE_LAYOUTS)[layout]
    typed = overrides(corpus, tmp_path / "run", true[precision].start, *keys, precision=precision)
    assert run_to_end(typed, size) == 0, log_path(typed).read_text()
    true[precision].check(tmp_path / "run")


@pytest.mark.prove
def test_two_ranks_in_bfloat16_are_as_near_to_float64_as_one(true, corpus, tmp_path: Path) -> None:
    apart = {}
    for name, size, precision in (("fp32", 1, "fp32"), ("bf16", 1, "bf16"), ("bf16x2", 2, "bf16")):
        typed = overrides(corpus, tmp_path / name, true["bf16"].start, precision=precision)
        assert run_to_end(typed, size) == 0, log_path(typed).read_text()
        apart[name] = true["bf16"].apart(tmp_path / name)
    # Over all steps or weights two draws of the same roundings are about as long.
    for kind, far in apart["bf16x2"].items():
        assert far <= FACTOR * apart["bf16"][kind], kind
        assert far > FACTOR * apart["fp32"][kind], f"{kind}: computed in float32"


@pytest.mark.parametrize("scope", [pytest.param("sequence", marks=pytest.mark.prove), "global"])
def test_a_balance_loss_counts_the_same_load_on_two_ranks(corpus, tmp_path: Path, scope: str) -> None:
    # Large enough to steer: a loss over half of the batch would be another one.
    keys = (f"moe.balance_scope={scope}", "moe.balance_loss=0.5", "moe.bias_rate=0.0")
    for name, size in (("alone", 1), ("two", 2)):
        assert run_to_end(overrides(corpus, tmp_path / name, *keys), size) == 0
    assert_same(tmp_path / "two", tmp_path / "alone")


def test_a_checkpoint_of_two_ranks_goes_on_with_one(alone, corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    # The file asks rank 0 to stop after a step; the run is then finished by another number of ranks.
    arguments = overrides(corpus, directory, "checkpoint.every=1000")
    ranks = spawn_ranks(arguments, 2)
    wait_for_metrics(directory, ranks)
    (directory / "PREEMPT").touch()
    for process in ranks:
        process.join(60)
        assert process.exitcode == STOPPED
    assert (directory / "REQUEUE").exists()
    assert run_to_end(arguments) == 0
    assert_same(directory, alone)


@pytest.mark.parametrize("key", ["parallel.dp_shard=3", "parallel.dp_replicate=3"])
def test_an_impossible_layout_is_refused_by_every_rank(corpus, tmp_path: Path, key: str) -> None:
    arguments = corpus.overrides(tmp_path / "run", key)
    assert run_to_end(arguments, 2) == 64
    assert key.split("=")[0] in log_path(arguments).read_text()
    assert not (tmp_path / "run").exists()
