"""Attention mixers on rows cut over ranks: outputs, losses and all gradients are those of one process."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.mixer import Mixed, Mixer, MixerConfig, Sequence
from model.sequence_sharding import UNSHARDED, AttentionView
from parallel.config.degrees import Degrees
from parallel.context import view as context_view
from parallel.context.chunks import cut_row, tails_before, whole_row
from parallel.context.sharding import HeadTailSharding
from parallel.mesh.axes import Axis, open_axes
from parallel.mesh.collectives import gather
from tests.architectures import randomise, small_architecture
from tests.worlds import run_world

WIDTH, DEPTH, TOKENS = 32, 4, 96


class Setting(NamedTuple):
    """An entry of conf/mixer/ with fields of its own, in training or not."""

    name: str
    fields: Mapping[str, Any] = {}
    uniform: float | None = None

    def build(self) -> Mixer:
        config = _entries()[self.name]
        config = type(config).model_validate(config.model_dump() | dict(self.fields))
        mixer = config.build(WIDTH, 1, DEPTH, 0.02).double()
        torch.manual_seed(3)
        randomise(mixer)
        return mixer


@cache
def _entries() -> dict[str, MixerConfig]:
    return small_architecture().mixer


SETTINGS = (
    Setting("attn"),
    Setting("attn", {"qk_norm": "all_heads", "logit_cap": 3.0, "has_sinks": True, "output_gate": "head"}),
    Setting("swa", {"window": 7, "has_sinks": True}),
    Setting("swa", {"window": 30}),
    Setting("swa", {"window": 1}),
    Setting("chunked"),
    Setting("chunked", {"chunk": 20}),
    Setting("nope", {"temperature_interval": 5}),
    Setting("mla"),
    Setting("mla", {"query_latent_dim": None}),
    Setting("zigzag"),
    Setting("dsa"),
    Setting("dsa", {"index_stage": "dense"}),
    Setting("dsa_pooled"),
    Setting("dsa_pooled", {"index_stage": "dense"}),
    Setting("dsa_shared"),
    Setting("moba"),
    Setting("msa", {"num_local_blocks": 2}),
    Setting("ssa"),
    Setting("ssa", {"stream": "full"}),
    Setting("ssa", uniform=0.1),
    Setting("ssa", uniform=0.9),
    Setting("nsa"),
    Setting("nsa", {"compressor": "mean", "has_shared_keys": True, "window": 17}),
    Setting("nsa", {"entry_length": 8, "entry_stride": 2, "block": 8}),
    Setting("swa_shared"),
    Setting("hca"),
    Setting("hca", {"compression": 16, "window": 20}),
    Setting("hca", {"compression": 1}),
    Setting("hca", {"compression": 128}),
    Setting("csa"),
    Setting("csa", {"compression": 6, "window": 1}),
)

STARTS = {
    "mixed": ([0, 5, 24, 25, 70], [0, 48, 90]),
    "one": ([0], [0]),
    "each": (list(range(TOKENS)), list(range(TOKENS))),
}


def packed(documents: str) -> tuple[Tensor, Tensor]:
    """Position and document of two rows."""
    is_start = torch.zeros(2, TOKENS, dtype=torch.long)
    for row, starts in zip(is_start, STARTS[documents], strict=True):
        row[starts] = 1
    index = torch.arange(TOKENS).expand(2, -1)
    position = index - torch.where(is_start == 1, index, 0).cummax(1).values
    return position, is_start.cumsum(1) - 1


def ranks(
    rank: int, size: int, settings: list[tuple[Setting, str]], broken: str = ""
) -> list[dict[str, Tensor]]:
    axis = open_axes(Degrees(cp=size), rank).cp
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(context_view, *BROKEN[broken])
        return [results(*setting, axis) for setting in settings]


def in_rank_order(x: Tensor, axis: Axis) -> Tensor:
    # Positions and documents stay: out of order they would be refused.
    return gather(x, axis, 1) if x.is_floating_point() else whole_row(x, axis)


def no_tails(x: Tensor, axis: Axis, count: int) -> Tensor:
    return 0.0 * tails_before(x, axis, count)


def one_behind(
    position: Tensor, document: Tensor | None, q_index: Tensor | None, *rest: Any
) -> AttentionView:
    return AttentionView(position, document, None if q_index is None else (q_index - 1).clamp(min=0), *rest)


# What is put in place of a function of the views.
BROKEN: dict[str, tuple[str, Any]] = {
    "rank order": ("whole_row", in_rank_order),
    "no halo": ("tails_before", no_tails),
    "q_index": ("AttentionView", one_behind),
}


def results(setting: Setting, documents: str, axis: Axis | None) -> dict[str, Tensor]:
    """Of the whole rows, gathered where they are cut; losses and gradients of weights are this rank's."""
    mixer, uniform = setting.build(), torch.Generator().manual_seed(2)
    x, weight = (torch.randn(2, TOKENS, WIDTH, generator=uniform).double() for _ in range(2))
    position, document = packed(documents)
    selection = nearest(position)
    cut = (
        UNSHARDED
        if axis is None
        else HeadTailSharding(axis, position, None if documents == "one" else document)
    )
    if axis is not None:
        x, weight, position, document, selection = (
            cut_row(part, axis) for part in (x, weight, position, document, selection)
        )
    x = x.requires_grad_()
    sequence = Sequence(
        position, None if documents == "one" else document, position, setting.uniform, sharding=cut
    )
    mixed = mixer(x, sequence, selection) if mixer.shares_selection else mixer(x, sequence)
    mixed = Mixed(mixed) if isinstance(mixed, Tensor) else mixed
    # Losses weigh enough to show in every gradient.
    losses = {name: 3.0 * loss for name, loss in (mixed.losses or {}).items()}
    ((mixed.out * weight).sum() + sum(losses.values())).backward()
    assert x.grad is not None
    tokens = {"out": mixed.out.detach(), "x": x.grad}
    if mixed.selection is not None:
        tokens["selection"] = mixed.selection
    if axis is not None:
        tokens = {name: whole_row(part, axis) for name, part in tokens.items()}
    losses = {f"loss {name}": loss.detach() for name, loss in losses.items()}
    grads = {f"grad {name}": part.grad for name, part in mixer.named_parameters() if part.grad is not None}
    return {**tokens, **losses, **grads}


def nearest(position: Tensor) -> Tensor:
    """What a layer gets that shares the keys of an earlier one: indices among whole rows."""
    reach = torch.arange(TOKENS)[:, None] - torch.arange(5)
    return torch.where(torch.arange(5) <= position[..., None], reach, -1)


def apart(found: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> dict[str, float]:
    """How far each result is from one process, relative to it; sums over ranks of what is partial."""
    # What cancels is noise of the numbers that it is made of.
    floor = 0.01 * max(float(x.abs().max()) for x in reference.values() if x.is_floating_point())
    far = {}
    for name, expected in reference.items():
        parts = [part[name] for part in found]
        whole = sum(parts) if name.startswith(("loss", "grad")) else parts[0]
        assert isinstance(whole, Tensor)
        assert whole.shape == expected.shape, name
        size = max(float(expected.double().abs().max()), floor)
        far[name] = float((whole - expected).double().abs().max()) / size
    return far


@pytest.mark.parametrize(
    ("size", "documents"), [(2, "mixed"), (3, "mixed"), (4, "mixed"), (3, "one"), (2, "each")]
)
def test_ranks_equal_one_process(size: int, documents: str) -> None:
    chosen = SETTINGS if size < 4 else SETTINGS[::3]
    found = run_world(size, ranks, [(setting, documents) for setting in chosen], timeout=280.0)
    for index, setting in enumerate(chosen):
        reference = results(setting, documents, None)
        assert all(set(part[index]) == set(reference) for part in found)
        for name, far in apart([part[index] for part in found], reference).items():
            assert far < 1e-12, (setting, name, far)


BREAKABLE = {
    "rank order": ("attn", "mla", "dsa", "msa", "nsa", "csa"),
    "no halo": ("swa", "chunked", "nsa", "swa_shared", "hca", "csa"),
    "q_index": ("attn", "swa", "dsa", "moba", "nsa", "hca"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_view_shows(broken: str) -> None:
    settings = [(Setting(name), "mixed") for name in BREAKABLE[broken]]
    found = run_world(2, ranks, settings, broken, timeout=280.0)
    for index, setting in enumerate(settings):
        far = apart([part[index] for part in found], results(*setting, None))
        assert far["out"] > 0.01, (setting, far)
        assert far["x"] > 0.01, (setting, far)


def test_layers_find_the_view_of_the_first() -> None:
    position, document = packed("mixed")
    cut = HeadTailSharding(Axis("cp", 0, (0,), None), position, document)
    assert cut.view(position, document, 3) is cut.view(position, document, 3)
    assert cut.view(position, document, 3) is not cut.view(position, document, 4)
    made = cut.compression(position, document, 4, 4, 0)
    assert made is cut.compression(position, document, 4, 4, 0)
    assert made is not cut.compression(position, document, 4, 4, 1)


def test_nothing_is_seen_before_a_row() -> None:
    rows = packed("one")
    view = HeadTailSharding(Axis("cp", 0, (0,), None), *rows).view(*rows, 3)
    assert view.document is not None
    assert view.q_index is not None
    assert view.document[:, :4].tolist() == [[-1, -1, -1, 0], [0, 0, 0, 0]] * 2
    assert view.q_index[0].tolist() == list(range(3, 3 + TOKENS // 2))
