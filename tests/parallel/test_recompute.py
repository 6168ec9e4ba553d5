"""Recomputing or offloading what blocks keep changes no loss and no gradient, in any layout."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from conf.compose import group_options
from model.block import Block
from model.config import Architecture
from model.language_model import LanguageModel
from model.mixer import Sequence
from parallel.block.offload import Hooks, OffloadedTensor
from parallel.block.recompute import Recompute
from parallel.config.degrees import Degrees
from tests.parallel.layouts import (
    ROWS,
    TOKENS,
    Result,
    alone,
    apart,
    architecture_of,
    assembled,
    batch_of,
    build,
    named,
    objective_of,
    on_rank,
)
from tests.worlds import run_world

MIXERS = group_options("mixer")
KEEPING = {
    "full": {"recompute": "full"},
    "feed-forwards": {"recompute": "moe dense"},
    "every half": {"recompute": " ".join([*MIXERS, "moe", "dense"])},
    "some mixers": {"recompute": "gdn dsa dsa_shared csa attn moe"},
    "offload": {"recompute": "none", "offload": "activations"},
    "offload beside recompute": {"recompute": "gdn csa moe", "offload": "activations"},
    "offload of streams": {"recompute": "full", "offload": "activations"},
}
# Four ranks of all mixers take their time; one of each kind of exchange does for the rest.
LAYOUT_MIXERS = {"offload beside recompute": ("gdn", "csa", "attn", "dsa", "dsa_shared")}
# Every way that blocks hand something on: chosen keys, losses of their own, an output that joins a layer
# later, several streams, and MTP modules.
HYPER = ("residual=hyper", "model.mtp.depth=1", "layout.ffn.pattern=shortcut dense")


def whole(config: Architecture, keys: Mapping[str, Any]) -> LanguageModel:
    """A model built as a run of one process builds it."""
    model = build(config, Degrees(), 0, keys)[0].whole
    assert model is not None
    return model


def nothing(model: LanguageModel) -> None:
    """Leaves the model as it is."""


def step(
    config: Architecture,
    keys: Mapping[str, Any],
    *,
    seed: int = 0,
    change: Callable[[LanguageModel], None] = nothing,
    between: Callable[[LanguageModel], None] = nothing,
) -> Result:
    """One process built as a run builds it; `change` before forward, `between` before backward."""
    model = whole(config, keys)
    batch = batch_of(config.model.vocab_size)
    change(model)
    torch.manual_seed(seed)
    losses = model.loss(
        batch.tokens, batch.targets, Sequence(batch.position, batch.document, batch.tokens, 0.3)
    )
    between(model)
    objective_of(losses, batch, model.config).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result(named(losses), grads)


def differing(found: Result, expected: Result) -> list[str]:
    """Names of what differs in any bit."""
    assert found.losses.keys() == expected.losses.keys()
    assert found.grads.keys() == expected.grads.keys()
    pairs = [(f.items(), e) for f, e in zip(found, expected, strict=True)]
    return [name for items, e in pairs for name, part in items if not torch.equal(part, e[name])]


@pytest.fixture(scope="module")
def every_mixer() -> tuple[Architecture, Result]:
    config = architecture_of()
    return config, step(config, {})


@pytest.mark.parametrize("keeping", KEEPING)
def test_every_mixer_keeps_every_bit(every_mixer, keeping: str) -> None:
    config, expected = every_mixer
    assert not differing(step(config, KEEPING[keeping]), expected)


@pytest.mark.parametrize("keeping", KEEPING)
def test_streams_shortcuts_and_dropout_keep_every_bit(keeping: str) -> None:
    config = architecture_of((*HYPER, "residual.dropout=0.1"), ("gdn", "attn", "dsa", "dsa_shared"))
    expected = step(config, {}, seed=1)
    assert not differing(step(config, KEEPING[keeping], seed=1), expected)
    assert differing(step(config, {}, seed=2), expected)


def test_names_of_parameters_stay() -> None:
    config = architecture_of(mixers=("gdn", "dsa"))
    plain, kept = (whole(config, keys) for keys in ({}, KEEPING["offload of streams"]))
    assert list(kept.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in kept.named_modules()] == [name for name, _ in plain.named_modules()]


def regions_of(model: LanguageModel) -> Iterator[tuple[Block, str, Recompute]]:
    """Every region that is recomputed, with its block and the attribute that it hangs on."""
    for block in model.modules():
        for name in ("run", "run_mixer", "run_ffn") if isinstance(block, Block) else ():
            if isinstance(region := getattr(block, name), Recompute):
                yield block, name, region


def test_other_random_numbers_the_second_time_are_seen() -> None:
    config = architecture_of(("residual.dropout=0.1",), ("gdn", "attn"))
    expected = step(config, {})
    for keys in (KEEPING["full"], KEEPING["every half"]):
        assert not differing(step(config, keys), expected)

        def forget(model: LanguageModel) -> None:
            for block, name, region in regions_of(model):
                setattr(block, name, replace(region, uses_rng=False))

        assert differing(step(config, keys, change=forget), expected)


def shift_choices(model: LanguageModel) -> None:
    """Other experts would be chosen now."""
    for router in model.routers():
        router.bias.copy_(torch.arange(len(router.bias)))


@pytest.mark.parametrize("keeping", ["full", "feed-forwards"])
def test_experts_are_chosen_once(keeping: str) -> None:
    config = architecture_of(mixers=("gdn", "attn"))
    expected = step(config, {})
    found = step(config, KEEPING[keeping], between=shift_choices)
    assert not differing(found, expected)
    assert found.losses["load"].sum() == ROWS * TOKENS * config.moe.top_k

    def forget(model: LanguageModel) -> None:
        for block, name, region in regions_of(model):
            setattr(block, name, replace(region, router=None))

    try:
        again = step(config, KEEPING[keeping], change=forget, between=shift_choices)
    except CheckpointError:
        return
    assert differing(again, expected)


def test_a_storage_moves_once_and_parameters_stay() -> None:
    owner = torch.nn.Linear(8, 8)
    hooks = Hooks(owner.parameters, 0)
    whole = torch.randn(4, 24)
    left, right = (hooks.pack(part) for part in whole.split([8, 16], dim=1))
    assert isinstance(left, OffloadedTensor)
    assert isinstance(right, OffloadedTensor)
    assert left.away is right.away
    back = [Hooks.unpack(part) for part in (left, right)]
    for found, expected in zip(back, whole.split([8, 16], dim=1), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert back[0].untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    assert hooks.pack(owner.weight.T).data_ptr() == owner.weight.data_ptr()
    assert isinstance(Hooks(owner.parameters, 10**6).pack(whole), Tensor)
    # What is written to afterwards is another tensor.
    whole.zero_()
    later = hooks.pack(whole)
    assert isinstance(later, OffloadedTensor)
    assert later.away is not left.away
    assert not Hooks.unpack(later).any()


@pytest.mark.parametrize(
    "keeping",
    [
        *(pytest.param(name, marks=pytest.mark.prove) for name in ("full", "every half")),
        "offload beside recompute",
    ],
)
def test_a_layout_equals_one_process(keeping: str) -> None:
    config, degrees = architecture_of(mixers=LAYOUT_MIXERS.get(keeping)), Degrees(cp=2, tp=2, ep=2)
    reference = alone(config)
    ranks = run_world(degrees.size, on_rank, config, degrees, "", KEEPING[keeping])
    found = assembled(reference, ranks)
    off = {name: apart(part, reference.losses[name]) for name, part in found.losses.items() if name != "load"}
    off |= {name: apart(found.grads[name], grad) for name, grad in reference.grads.items()}
    assert max(off.values()) < 1e-12, off
