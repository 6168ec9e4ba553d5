"""Some steps of training in any layout beside the same steps of one process, for a model of each mixer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.compose import group_options
from model.initial import initial_values
from model.language_model import LanguageModel
from model.mixer import Mixer
from parallel.apply import Parallel
from parallel.config.degrees import Degrees
from parallel.mesh.axes import Axes, open_axes
from parallel.mesh.world import World
from parallel.shard.shard_map import local_slices
from parallel.shard.shard_view import GlobalShardView
from parallel.shard.tensor import TensorHeadShards
from tests.closeness import moved_by
from tests.parallel.layouts import EVEN, value_of
from tests.train.runs import overrides_of
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.loop.metrics import digest_samples
from train.loop.run import build_state, open_data
from train.loop.state import TrainState
from train.loop.step import train_step
from train.loop.zero import ZeroState

STEPS = 3
EPS = torch.finfo(torch.float32).eps
# Every axis alone, then every pair of axes in at least one layout of several.
LAYOUTS = {
    "shard2": Degrees(dp_shard=2),
    "replicate2": Degrees(dp_replicate=2),
    "cp2": Degrees(cp=2),
    "tp2": Degrees(tp=2),
    "ep2": Degrees(dp_shard=2, ep=2),
    "pp2": Degrees(pp=2),
    "cp4-ep2": Degrees(cp=4, ep=2),
    "replicate2-shard2-ep2": Degrees(dp_replicate=2, dp_shard=2, ep=2),
    "pp2-shard2-ep2": Degrees(pp=2, dp_shard=2, ep=2),
    "pp2-replicate2": Degrees(pp=2, dp_replicate=2),
    "pp2-cp2-tp2": Degrees(pp=2, cp=2, tp=2),
    "replicate2-cp2-tp2-ep2": Degrees(dp_replicate=2, cp=2, tp=2, ep=2),
    "shard2-cp2-tp2-ep4": Degrees(dp_shard=2, cp=2, tp=2, ep=4),
}
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
MIXERS = tuple(sorted(group_options("mixer")))
# What reads the choice of a layer before it stands behind one; any other before softmax attention.
PATTERNS = {mixer: f"{mixer} attn" for mixer in MIXERS} | {"dsa_shared": "attn dsa dsa_shared"}
PRECISIONS = {"float64": "fp64", "float32": "fp32"}
# What float64 leaves of sums in another order; what float32 leaves is found for each run, in truth.py.
LIMIT = 1e-12


class Job(NamedTuple):
    """One model in one layout. fault breaks one thing that layouts stand on.

    moved: the draw by which the first weights go up or down by `by` times an eps of float32; on one process
    alone.
    """

    config: RunConfig
    degrees: Degrees
    fault: str = ""
    moved: int | None = None
    by: float = 1.0


class Forgetful(Parallel):
    """Leaves out the sum over what ranks of the tensor axis hold copies of."""

    def sum_shared_gradients(self, axes: Axes) -> None:
        """Does nothing."""


class Deaf(TensorHeadShards):
    """Goes by its own query heads of a key head alone."""

    def sum_kv_replicas(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class Block(NamedTuple):
    """A block of a parameter, of its first moment, and where they lie in the whole; on one rank.

    A frozen parameter has no moment.
    """

    name: str
    piece: Any
    weight: Tensor
    moment: Tensor | None


class Run(NamedTuple):
    """What one rank saw: numbers of every step, sample ids of every step, its blocks after the last."""

    numbers: list[dict[str, float]]
    loads: list[Tensor]
    samples: list[str]
    biases: dict[str, Tensor]
    blocks: list[Block]


def config_of(pattern: str, precision: str, dataset: Path, *more: str) -> RunConfig:
    """A model with the layers of a pattern, routed experts and all losses."""
    overrides = overrides_of(dataset, dataset, Path("unused"))
    keys = (
        *EVEN,
        f"layout.pattern={pattern}",
        f"model.depth={len(pattern.split())}",
        "layout.ffn.pattern=moe dense",
        f"precision={PRECISIONS[precision]}",
        "model.width=32",
        "moe.num_experts=8",
        "residual.dropout=0.0",
        # Every step is clipped, and the first already has the whole learning rate, one of published runs.
        # At ten times it, one process in float32 is already 1.7e-5 from itself in float64.
        "optim.clip_norm=0.5",
        "optim.lr=0.0003",
        "schedule.warmup_steps=0",
        f"train.steps={STEPS + 1}",
        # Gradients that are zero by algebra are all rounding, and AdamW would divide it by itself: of streams
        # that are still alike, say. Others are some 1e-3.
        *["optim.eps=0.00001"] * (precision == "float32"),
        *more,
    )
    return load_config([*overrides, *keys], 1)


def on_rank(rank: int, size: int, jobs: list[Job]) -> list[Run]:
    """The runs of this rank, one after the other."""
    axes: dict[Degrees, Any] = {}
    found = []
    for job in jobs:
        assert job.degrees.size == size, f"{job.degrees} on {size} processes"
        if job.degrees not in axes:
            axes[job.degrees] = open_axes(job.degrees, rank)
        found.append(run(job, World(rank, size, torch.device("cpu"), axes[job.degrees])))
    return found


def run(job: Job, world: World) -> Run:
    """STEPS steps from values that are never constant."""
    config = laid_out(job.config, job.degrees)
    loader = open_data(config, world.rank)
    state = build_state(config, world)
    fill(state, config)
    move(state, job.moved, job.by)
    if job.fault == "gradients of copies":
        state.built = Forgetful(**vars(state.built))
    for module in state.built.modules():
        if job.fault == "sums of a group" and isinstance(module, Mixer):
            assert isinstance(module.head_shards, TensorHeadShards), f"{module.head_shards=}"
            module.head_shards = Deaf(module.head_shards.axis, module.head_shards.kv_replicas)
    rows, _ = config.rank_rows(world.axes.batch.size)
    numbers, loads, samples = [], [], []
    for _ in range(STEPS):
        batch_rank = 0 if job.fault == "rows of the first" else world.axes.batch.rank
        batch = loader.batch(state.cursor + batch_rank * rows, rows)
        samples.append(digest_samples(batch, world))
        result = train_step(state, batch, config, world)
        assert not result.is_skipped
        assert result.grad_norm > config.optim.clip_norm, f"{result.grad_norm} is not clipped"
        numbers.append({"loss": result.loss, "norm": result.grad_norm, **result.auxiliary})
        loads.append(result.load)
    names = [name for name in state.built.state() if name.endswith("router.bias")]
    biases = {name: state.built.state()[name].clone() for name in names}
    return Run(numbers, loads, samples, biases, list(blocks_of(state)))


def laid_out(config: RunConfig, degrees: Degrees) -> RunConfig:
    """The config with the degrees of a layout."""
    settings = {name: getattr(degrees, name) for name in AXES}
    # Two micro-batches where a rank has the rows for them: a pipeline wants several.
    micro = config.train.global_batch // degrees.batch // 2
    train = config.train.model_copy(update={"micro_batch": max(1, micro)})
    parallel = config.parallel.model_copy(update=settings)
    return config.model_copy(update={"parallel": parallel, "train": train})


def fill(state: TrainState, config: RunConfig) -> None:
    """The same values in every layout, near the first ones. Mutates the parameters."""
    with torch.device("meta"):
        initials = initial_values(LanguageModel(config.architecture))
    for name, parameter in state.built.named_parameters():
        shape = state.built.shard_maps[name].shape
        state.built.fill(name, parameter, value_of(name, initials[name], shape))


@torch.no_grad()
def move(state: TrainState, draw: int | None, by: float = 1.0) -> None:
    """Moves every weight up or down by so many eps of float32. Mutates the parameters."""
    if draw is None:
        return
    weights = [parameter for _, parameter in state.built.named_parameters()]
    assert all(weight.dtype == torch.float64 for weight in weights), "moved by less than they round"
    for weight, moved in zip(weights, moved_by(weights, by * EPS, draw), strict=True):
        weight.copy_(moved)


def blocks_of(state: TrainState) -> Iterable[Block]:
    """What this rank holds of parameters, and of the running mean of their gradients."""
    if isinstance(state, ZeroState):
        moments, values = state.moments(), state.built.state()
        for name in state.built.shard_maps:
            weights = as_stored(state.built.checkpoint_view(name, values[name])).blocks.values()
            if name not in moments:
                yield from (Block(name, piece, weight.clone(), None) for weight, piece in weights)
                continue
            means = as_stored(moments[name]["exp_avg"]).blocks.values()
            for (weight, piece), (moment, _) in zip(weights, means, strict=True):
                yield Block(name, piece, weight.clone(), moment.clone())
        return
    for name, parameter in state.built.named_parameters():
        shard_map = state.built.shard_maps[name]
        if not parameter.requires_grad:
            blocks = local_slices(parameter.detach(), shard_map)
            yield from (Block(name, piece, weight.clone(), None) for weight, piece in blocks)
            continue
        moments = local_slices(state.optimizer.state[parameter]["exp_avg"], shard_map)
        for (weight, piece), (moment, _) in zip(
            local_slices(parameter.detach(), shard_map), moments, strict=True
        ):
            yield Block(name, piece, weight.clone(), moment.clone())


def as_stored(x: Tensor) -> GlobalShardView:
    """What a checkpoint takes a part of."""
    assert isinstance(x, GlobalShardView), f"{type(x)=}"
    return x


class Apart(NamedTuple):
    """Largest relative difference of each kind: loss, gradient norm, gradients, weights."""

    loss: float
    norm: float
    gradient: float
    weight: float

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(self)


def compare(reference: Run, ranks: Sequence[Run]) -> Apart:
    """How far the run of a layout is from that of one process.

    Raises AssertionError where what must be the same is not: sample ids, loads, biases of experts, copies
    of one block on two ranks, or a part that no rank holds.
    """
    for rank in ranks:
        assert rank.samples == reference.samples, "sample ids differ"
        assert all(torch.equal(a, b) for a, b in zip(rank.loads, reference.loads, strict=True)), (
            "loads differ"
        )
        for name, bias in rank.biases.items():
            assert torch.equal(bias, reference.biases[name]), f"bias of {name} differs"
        assert rank.numbers == ranks[0].numbers, "ranks report different losses"
    numbers = list(zip(ranks[0].numbers, reference.numbers, strict=True))
    assert all(a.keys() == b.keys() for a, b in numbers), "losses are missing"
    losses = (relative(a[key], b[key]) for a, b in numbers for key in b if key != "norm")
    norms = (relative(a["norm"], b["norm"]) for a, b in numbers)
    weight = tensors_apart(reference, ranks, "weight")
    moment = tensors_apart(reference, ranks, "moment")
    return Apart(max(losses), max(norms), max(moment.values()), max(weight.values()))


def relative(found: float, expected: float) -> float:
    """Difference over size."""
    return abs(found - expected) / abs(expected) if found != expected else 0.0


def tensors_apart(reference: Run, ranks: Sequence[Run], kind: str) -> Mapping[str, float]:
    """The norm of the difference over the norm, for every parameter by name."""
    expected = wholes_of(reference, [reference], kind)
    found = wholes_of(reference, ranks, kind)
    return {name: ((found[name] - w).norm() / w.norm()).item() for name, w in expected.items()}


def wholes_of(reference: Run, ranks: Sequence[Run], kind: str) -> Mapping[str, Tensor]:
    """Whole weights or moments by name, of the reference's shapes, put together from the blocks of all ranks.

    Raises AssertionError where copies differ, or no rank holds a part.
    """
    wholes = {block.name: getattr(block, kind) for block in reference.blocks}
    found: dict[str, Tensor] = {}
    for block in (block for rank in ranks for block in rank.blocks):
        part = getattr(block, kind)
        assert (part is None) == (wholes[block.name] is None), f"{block.name} is frozen on one side alone"
        if part is None:
            continue
        if block.name not in found:
            found[block.name] = torch.full(wholes[block.name].shape, torch.nan, dtype=part.dtype)
        whole = block.piece.global_view(found[block.name])
        assert bool(((whole == part) | whole.isnan()).all()), f"copies of {block.name} differ"
        whole.copy_(part)
    for name, whole in found.items():
        assert not whole.isnan().any(), f"no rank holds all of {name}"
    missing = {name for name, whole in wholes.items() if whole is not None} - found.keys()
    assert not missing, f"no rank holds {missing}"
    return found
