"""What torch.compile takes of blocks changes no loss and no gradient, and compiles once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from conf.compose import group_options
from conf.errors import ConfigError
from data.loader import Batch
from kernels.attention import attention
from model.block import Block
from model.config import Architecture
from model.language_model import LanguageModel
from model.linear import Linear
from model.mixer import Sequence
from parallel.block.compile import Backend, Fuser, describe, fused_methods
from parallel.config.degrees import Degrees
from parallel.context.sharding import cut_rows
from tests.closeness import DRAWS, assert_within, limits_of, moved_by
from tests.parallel.layouts import (
    Result,
    alone,
    apart,
    architecture_of,
    assembled,
    batch_of,
    build,
    denominators_of,
    named,
    objective_of,
    on_rank,
)
from tests.worlds import process_pool, run_world
from train.config.load import load_config
from train.rehearse import rehearse

MIXERS = group_options("mixer")
COMPILE = {"compile": True}
FEW = ("gdn", "csa")
STREAMS = ("residual=hyper", "model.mtp.depth=1", "layout.ffn.pattern=shortcut dense")
LIMIT = 1e-12
WIDE = (torch.float64, torch.float64)
# Capture, joint graph of forward and backward, no code.
GRAPHS = "aot_eager"


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """Functions as in a run: the checks of shapes around every function of a test are no graph."""
    with unchecked():
        counters.clear()
        yield
    torch._dynamo.reset()


class unchecked:
    """Turns the checks of shapes off."""

    def __enter__(self) -> None:
        jaxtyping.config.update("jaxtyping_disable", True)

    def __exit__(self, *args: object) -> None:
        jaxtyping.config.update("jaxtyping_disable", False)


def compiled_rank(*args: Any) -> Any:
    """A rank of `on_rank` without checks of shapes."""
    with unchecked():
        return on_rank(*args)


def whole(config: Architecture, keys: Mapping[str, Any], backend: Backend = GRAPHS) -> LanguageModel:
    """A model built as a run of one process builds it."""
    model = build(config, Degrees(), 0, keys, backend)[0].whole
    assert model is not None
    return model


def backward(model: LanguageModel, batch: Batch, draw: float) -> Result:
    """Losses and gradients of a batch."""
    model.zero_grad()
    sequence = Sequence(batch.position, batch.document, batch.tokens, draw)
    losses = model.loss(batch.tokens, batch.targets, sequence)
    objective_of(losses, batch, model.config).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Result(named(losses), grads)


def steps(model: LanguageModel, count: int = 3) -> list[Result]:
    """Steps of SGD, each with documents packed in another way and another draw.

    Not of Adam: it divides by the gradient's own size, and so makes of the rounding of a gradient near zero
    a difference of weights.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    batch, found = batch_of(model.config.model.vocab_size), []
    for step in range(count):
        rolled = Batch(*(part.roll(step, 0) for part in batch))
        rolled.document[step % 2].zero_()
        rolled.position[step % 2].copy_(torch.arange(rolled.position.shape[1]))
        found.append(backward(model, rolled, 0.1 + 0.3 * step))
        optimizer.step()
    found.append(Result({}, {name: p.detach() for name, p in model.named_parameters()}))
    return found


def off(found: Result, expected: Result) -> float:
    """The largest relative difference of any loss or gradient."""
    assert found.losses.keys() == expected.losses.keys()
    assert found.grads.keys() == expected.grads.keys()
    pairs = [(f.items(), e) for f, e in zip(found, expected, strict=True)]
    return max(apart(part, e[name]) for items, e in pairs for name, part in items)


def furthest(found: list[Result], expected: list[Result]) -> float:
    """The same over all steps."""
    return max(off(f, e) for f, e in zip(found, expected, strict=True))


def graphs() -> int:
    """How many graphs were captured."""
    return counters["stats"]["unique_graphs"]


def assert_trains_as_eager(config: Architecture, backend: Backend = GRAPHS) -> None:
    """Losses, gradients and weights of some steps; one graph per group, none in later steps.

    Streams start as one tensor seen several times: the first layer has graphs of its own for reading and
    writing them.
    """
    expected = steps(whole(config, {}))
    model = whole(config, COMPILE, backend)
    groups = {id(fused.compiled) for fused in fused_methods(model.modules())}
    backward(model, batch_of(config.model.vocab_size), 0.5)
    assert graphs() == len(groups) + 2 * (config.residual.kind == "hyper")
    first = graphs()
    assert furthest(steps(model), expected) < LIMIT
    assert graphs() == first


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(STREAMS, marks=pytest.mark.prove),
        ("residual=sandwich",),
        ("residual=scaled_post_norm",),
    ],
)
def test_some_mixers_train_as_eager(overrides: tuple[str, ...]) -> None:
    assert_trains_as_eager(architecture_of(overrides, ("gdn", "attn")))


@pytest.mark.prove
def test_every_mixer_trains_as_eager() -> None:
    assert_trains_as_eager(architecture_of())


@pytest.mark.prove
def test_what_inductor_makes_trains_as_eager() -> None:
    assert_trains_as_eager(architecture_of(STREAMS, ("attn", "gdn")), "inductor")


def test_layers_of_one_kind_share_graphs() -> None:
    config = architecture_of(mixers=("gdn", "attn") * 3)
    model = whole(config, COMPILE, "eager")
    backward(model, batch_of(config.model.vocab_size), 0.3)
    # Projections apart and closed of both mixers, decay, and two of the router.
    assert graphs() == 7
    assert describe(model.modules()).count(" x 3") == 7


def test_without_gradients_rows_of_any_length_run_uncompiled() -> None:
    config = architecture_of(mixers=("gdn", "attn"))
    model, plain = whole(config, COMPILE), whole(config, {})
    tokens = batch_of(config.model.vocab_size).tokens
    with torch.no_grad():
        for length in (1, 2, 7, 32):
            assert torch.equal(model(tokens[:, :length]), plain(tokens[:, :length]))
    assert graphs() == 0


def test_states_go_from_compiled_to_plain_and_back() -> None:
    config = architecture_of(mixers=("gdn", "attn"))
    plain, model = whole(config, {}), whole(config, COMPILE)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    steps(model, 1)
    plain.load_state_dict(model.state_dict())
    batch = batch_of(config.model.vocab_size)
    assert off(backward(plain, batch, 0.2), backward(model, batch, 0.2)) < LIMIT
    steps(plain, 1)
    model.load_state_dict(plain.state_dict())
    assert off(backward(plain, batch, 0.2), backward(model, batch, 0.2)) < LIMIT


class Stale:
    """What a graph would be that keeps the first weights that it saw."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain, self.seen = plain, {}

    def __call__(self, owner: nn.Module, *args: Any) -> Any:
        values = self.seen.setdefault(id(owner), {n: p.detach().clone() for n, p in owner.named_parameters()})
        now = {name: p.detach().clone() for name, p in owner.named_parameters()}
        with torch.no_grad():
            for name, parameter in owner.named_parameters():
                parameter.data = values[name]
        out = self.plain(owner, *args)
        for name, parameter in owner.named_parameters():
            parameter.data = now[name]
        return out


def test_stale_constants_are_seen() -> None:
    config = architecture_of(mixers=("gdn",))
    expected = steps(whole(config, {}))
    model = whole(config, COMPILE)
    for fused in fused_methods(model.modules()):
        stale = replace(fused, compiled=Stale(fused.plain))
        setattr(fused.owner, fused.plain.__name__, stale)
    found = steps(model)
    assert off(found[0], expected[0]) < LIMIT
    assert off(found[1], expected[1]) > 1e-6


class Breaking(Linear):
    """Its forward is not one graph."""

    fusible = ("forward",)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Attending(Linear):
    """Its forward calls a kernel of a mixer."""

    fusible = ("forward",)

    def forward(self, x: Tensor) -> Tensor:
        heads = x[:, :, None]
        return attention(heads, heads, heads, scale=1.0)[:, :, 0]


@pytest.mark.parametrize(("kind", "error"), [(Breaking, Unsupported), (Attending, Exception)])
def test_what_is_no_graph_is_an_error(kind: type[Linear], error: type[Exception]) -> None:
    model = LanguageModel(architecture_of(mixers=("conv",)))
    (block,) = model.blocks
    assert isinstance(block, Block)
    block.register_module("mixer", kind(32, 32, 0.02))
    Fuser(GRAPHS)(block)
    x = torch.randn(2, 5, 32, requires_grad=True)
    with pytest.raises(error, match=r"graph_break|kernels\.attention"):
        block.get_submodule("mixer")(x)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (
            ["kernels.rotary=triton"],
            "kernels.rotary: parallel.compile=true takes plain torch inside its graphs",
        ),
        (
            ["parallel.pp=2", "parallel.pp_schedule=zero_bubble"],
            "parallel.compile: true is not tried beside parallel.pp_schedule=zero_bubble; set that to 1f1b",
        ),
        (["parallel.data=zero"], "parallel.compile: true is not tried beside zero; set it to false"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["parallel.compile=true", *overrides], 1)
    assert any(str(violation).startswith(found) for violation in caught.value.violations)
    assert not load_config([], 1).parallel.compile


def test_a_rehearsal_says_the_same() -> None:
    keys = ["cluster.nodes=1", "cluster.gpus_per_node=2", "parallel.ep=2", "layout=attn", "model.depth=1"]
    with process_pool(2) as pool:
        compiled = rehearse(load_config([*keys, "parallel.compile=true"], None), pool)
        assert compiled == rehearse(load_config(keys, None), pool)


def narrow_rank(rank: int, size: int, config: Architecture) -> None:
    """Plain and compiled steps in bfloat16 are float64 rounded; parts are gathered by themselves."""
    degrees, narrow = Degrees(dp_shard=size), (torch.float32, torch.bfloat16)

    def step(keys: Mapping[str, Any], dtypes: tuple[torch.dtype, torch.dtype], draw: int | None) -> Result:
        built, world = build(config, degrees, rank, keys, GRAPHS, dtypes)
        if draw is not None:
            weights = [as_dtensor(p).to_local() for _, p in built.named_parameters()]
            eps = torch.finfo(torch.bfloat16).eps
            with torch.no_grad():
                for weight, moved in zip(weights, moved_by(weights, eps, draw), strict=True):
                    weight.copy_(moved)
        batch = batch_of(config.model.vocab_size)
        rows = Batch(*(part[rank::size] for part in batch))
        counts = denominators_of(batch, config)
        losses = built.runner.step([cut_rows(rows, world.axes.cp, uniform=0.3)], counts)
        assert bool(keys) == (graphs() > 0)
        alone = (isinstance(fused.owner, FSDPModule) for fused in fused_methods(built.modules()))
        assert any(alone) == bool(keys)
        grads = {name: p.grad for name, p in built.named_parameters() if p.grad is not None}
        return Result(named(losses), {name: as_dtensor(grad).to_local() for name, grad in grads.items()})

    with unchecked():
        true, *moved = (step({}, WIDE, draw) for draw in (None, *range(DRAWS)))
        for keys in ({}, COMPILE):
            found = step(keys, narrow, None)
            for part, expected, *others in zip(found, true, *moved, strict=True):
                tensors = [[named[name] for name in expected] for named in (part, expected, *others)]
                limits = limits_of(tensors[1], tensors[2:], torch.bfloat16)
                assert_within(*tensors[:2], limits, names=[f"{keys} {name}" for name in expected])


def as_dtensor(x: Tensor) -> DTensor:
    assert isinstance(x, DTensor), f"{type(x)=}"
    return x


@pytest.mark.prove
def test_parts_that_are_gathered_by_themselves_train_as_eager() -> None:
    run_world(2, narrow_rank, architecture_of(("residual=hyper",), ("gdn",)))


LAYOUTS = {
    "shards": (Degrees(dp_shard=2), {}, ("gdn", "attn")),
    "heads": (Degrees(tp=2), {"recompute": "full"}, ("gdn",)),
    "every axis": (Degrees(cp=2, tp=2, ep=2), {}, None),
    "recompute": (Degrees(dp_shard=2, ep=2), {"recompute": "full"}, FEW),
    "offload": (Degrees(dp_shard=2), {"recompute": "gdn moe", "offload": "activations"}, FEW),
    "pipeline": (Degrees(pp=2, dp_shard=2), {}, FEW),
}
QUICK = ("heads",)


@pytest.mark.parametrize(
    "layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.prove) for name in LAYOUTS]
)
def test_a_layout_equals_one_process(layout: str) -> None:
    degrees, keys, mixers = LAYOUTS[layout]
    config = architecture_of(mixers=mixers)
    reference = alone(config)
    ranks = run_world(
        degrees.size, compiled_rank, config, degrees, "", {**COMPILE, **keys}, GRAPHS, timeout=600
    )
    found = assembled(reference, ranks)
    assert off(found, Result({**reference.losses, "load": found.losses["load"]}, reference.grads)) < LIMIT
