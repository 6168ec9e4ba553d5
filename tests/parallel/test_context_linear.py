"""Linear mixers on rows cut over ranks are those of one process, document by document; so are gradients."""

from collections.abc import Sequence as Items
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.choose import use_backends
from model.mixer import Mixer, MixerConfig, Sequence
from model.recurrence import Recurrence
from model.sequence_sharding import AttentionView
from parallel.config.degrees import Degrees
from parallel.context.chunks import cut_row, whole_row
from parallel.context.sharding import HeadTailSharding
from parallel.mesh.axes import Axis, open_axes
from tests.architectures import randomise, small_architecture
from tests.closeness import assert_rounded, function_of, relative
from tests.worlds import run_world

WIDTH, DEPTH = 12, 3
FIELDS = {
    "gdn": ("gdn.num_key_heads=2", "gdn.num_value_heads=4", "gdn.key_dim=4", "gdn.value_dim=3"),
    "gdn without decay": ("gdn.has_decay=false", "gdn.num_key_heads=1", "gdn.num_value_heads=3"),
    "kda": ("kda.num_heads=2", "kda.key_dim=4", "kda.value_dim=3"),
    "kda bounded": ("kda.decay=bounded_sigmoid", "kda.num_heads=3", "kda.key_dim=4", "kda.value_dim=3"),
    "lightning": ("lightning.num_heads=3", "lightning.key_dim=4"),
    "lightning retnet": ("lightning.decay=retnet", "lightning.rotary_dim=4"),
    "lightning learned": ("lightning.decay=learned", "lightning.num_heads=4", "lightning.norm=per_head"),
    "lightning channel": ("lightning.decay=channel", "lightning.num_heads=2", "lightning.output_gate=none"),
    "mamba2": ("mamba2.num_heads=4", "mamba2.num_key_heads=2", "mamba2.key_dim=4", "mamba2.value_dim=3"),
    "mamba": ("mamba.num_channels=10", "mamba.state_dim=3"),
    "conv": ("conv.conv_width=5",),
}


class Chunks(HeadTailSharding):
    """The head-tail cut for mixers that take no view."""

    def view(self, position: Tensor, document: Tensor | None, reach: int | None) -> AttentionView:
        raise AssertionError("no linear mixer takes a view")


class Case(NamedTuple):
    """Rows of so many tokens, and where the documents of each row start."""

    tokens: int
    starts: tuple[tuple[int, ...], ...]


# Chunks on 2, 3 and 4 ranks have 24, 16 and 12 tokens: documents of one token, and starts on cuts.
PACKED = Case(96, ((0, 5, 24, 25, 70), (0, 48, 50)))
ONE = Case(96, ((0,), (0,)))
CASES = (PACKED, ONE, Case(24, (tuple(range(24)), tuple(range(0, 24, 3)))), Case(24, ((0, 7), (0, 1, 12))))


@cache
def config_of(name: str) -> MixerConfig:
    kind, entries = name.split()[0], small_entries()
    values = dict(field.split("=") for field in FIELDS[name])
    fields = {key.removeprefix(f"{kind}."): value for key, value in values.items()}
    return type(entries[kind]).model_validate(entries[kind].model_dump() | fields, strict=False)


@cache
def small_entries() -> dict[str, MixerConfig]:
    return small_architecture().mixer


def build(config: MixerConfig) -> Mixer:
    """The mixer in float64, everything in it random, and with a memory of hundreds of tokens."""
    torch.manual_seed(7)
    mixer = config.build(WIDTH, 1, DEPTH, 0.02).double()
    randomise(mixer)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name in ("decay.dt_bias", "step.dt_bias"):
                parameter -= 4.0
    return mixer


def drawn(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (2, len(case.starts), case.tokens, WIDTH)
    x, weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, weight


def packed(case: Case) -> Sequence:
    index = torch.arange(case.tokens)
    rows = [(index[:, None] >= torch.tensor(starts)).sum(1) - 1 for starts in case.starts]
    firsts = [torch.tensor(starts)[row] for starts, row in zip(case.starts, rows, strict=True)]
    position = torch.stack([index - first for first in firsts])
    document = None if max(map(len, case.starts)) == 1 else torch.stack(rows)
    return Sequence(position, document, position)


def outcome(mixer: Mixer, x: Tensor, weight: Tensor, sequence: Sequence) -> list[Tensor]:
    """Output, gradient of x, gradients of the parameters."""
    x = x.clone().requires_grad_()
    out = mixer(x, sequence)
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [x, *mixer.parameters()])]


def alone(config: MixerConfig, case: Case) -> list[Tensor]:
    """What comes out of one process that runs every document by itself."""
    mixer, (x, weight) = build(config), drawn(case)
    found: list[list[Tensor]] = []
    for row, starts in enumerate(case.starts):
        for start, end in zip(starts, (*starts[1:], case.tokens), strict=True):
            part = slice(row, row + 1), slice(start, end)
            sequence = Sequence.whole(torch.zeros(1, end - start, dtype=torch.long))
            found.append(outcome(mixer, x[part], weight[part], sequence))
    tokens = [torch.cat([part[i] for part in found], 1).view_as(x) for i in (0, 1)]
    return tokens + [torch.stack(grads).sum(0) for grads in zip(*(part[2:] for part in found), strict=True)]


def cut(sequence: Sequence, axis: Axis, how: type[Chunks]) -> Sequence:
    document = None if sequence.document is None else cut_row(sequence.document, axis)
    position, tokens = (cut_row(x, axis) for x in (sequence.position, sequence.tokens))
    return Sequence(position, document, tokens, sharding=how(axis, sequence.position, sequence.document))


def on_axis(axis: Axis, how: type[Chunks], config: MixerConfig, case: Case, shift: int = 0) -> list[Tensor]:
    x, weight = (cut_row(part, axis) for part in drawn(case))
    sequence = cut(packed(case), axis, how)
    sequence = replace(sequence, position=sequence.position + shift)
    out, grad, *grads = outcome(build(config), x, weight, sequence)
    return [whole_row(out, axis), whole_row(grad, axis), *grads]


def on_rank(rank: int, size: int, jobs: Items[tuple[MixerConfig, Case]]) -> list[list[Tensor]]:
    axis = open_axes(Degrees(cp=size), rank).cp
    return [on_axis(axis, Chunks, *job) for job in jobs]


def summed(found: Items[list[Tensor]]) -> list[Tensor]:
    """Outputs and gradients of x of one rank, which has all; gradients of parameters of all ranks."""
    return found[0][:2] + [torch.stack(grads).sum(0) for grads in zip(*(f[2:] for f in found), strict=True)]


def worst(found: Items[Tensor], expected: Items[Tensor]) -> float:
    """The largest relative distance of two lists of tensors."""
    return max(relative(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@cache
def alone_all() -> dict[tuple[str, Case], list[Tensor]]:
    return {(name, case): alone(config_of(name), case) for name in FIELDS for case in CASES}


@pytest.mark.parametrize("name", FIELDS)
def test_one_process_packed_is_each_document_alone(name: str) -> None:
    for case in CASES:
        x, weight = drawn(case)
        found = outcome(build(config_of(name)), x, weight, packed(case))
        assert worst(found, alone_all()[name, case]) < 1e-12, case


@pytest.mark.parametrize("name", FIELDS)
def test_two_chunks_of_one_process_are_each_document_alone(name: str) -> None:
    axis = Axis("cp", 0, (0,), None)
    for case in CASES:
        found = on_axis(axis, Chunks, config_of(name), case)
        assert worst(found, alone_all()[name, case]) < 1e-12, case


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_are_each_document_alone(size: int) -> None:
    jobs = list(alone_all())
    ranks = run_world(size, on_rank, [(config_of(name), case) for name, case in jobs])
    distances = {
        job: worst(summed([rank[index] for rank in ranks]), alone_all()[job])
        for index, job in enumerate(jobs)
    }
    assert max(distances.values()) < 1e-12, distances


class NoHalo(Chunks):
    """Convolutions start from zeros in every chunk."""

    def before(self, x: Tensor, count: int) -> Tensor:
        return torch.zeros_like(super().before(x, count))


class RankOrder(Chunks):
    """The two chunks of a rank are taken for each other."""

    def chunks(self, x: Tensor) -> Tensor:
        return super().chunks(x).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    def restore(self, x: Tensor) -> Tensor:
        return super().restore(x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))


class NoTransition(Chunks):
    """A state ends with the chunk that wrote it."""

    def recur(
        self, recurrence: Recurrence, inputs: tuple[Tensor, ...], position: Tensor, document: Tensor | None
    ) -> Tensor:
        made = recurrence.factor
        with mock.patch.object(recurrence, "factor", lambda *args: torch.zeros_like(made(*args))):
            return super().recur(recurrence, inputs, position, document)


class NoStart(Chunks):
    """Gradients of a state stop at the chunk that reads it."""

    def recur(
        self, recurrence: Recurrence, inputs: tuple[Tensor, ...], position: Tensor, document: Tensor | None
    ) -> Tensor:
        made = recurrence.initial_state_grad
        with mock.patch.object(recurrence, "initial_state_grad", lambda *args: torch.zeros_like(made(*args))):
            return super().recur(recurrence, inputs, position, document)


SAME = Case(96, ((0, 48), (0, 24)))


class Fault(NamedTuple):
    """A cut that does something wrong, positions moved by so much, and what must then be wrong."""

    how: type[Chunks]
    shift: int
    case: Case
    name: str
    spoils_output: bool = True


STATES = ("gdn", "kda", "lightning learned", "lightning channel", "mamba2", "mamba")
FAULTS = (
    *(Fault(NoHalo, 0, ONE, name) for name in ("gdn", "kda", "mamba2", "mamba", "conv")),
    *(Fault(RankOrder, 0, ONE, name) for name in (*STATES, "conv")),
    *(Fault(NoTransition, 0, ONE, name) for name in STATES),
    *(Fault(NoStart, 0, ONE, name, spoils_output=False) for name in STATES),
    # Positions that say that every chunk goes on with a document: starts at cuts are lost.
    *(Fault(Chunks, 96, SAME, name) for name in (*STATES, "conv")),
)


def with_faults(rank: int, size: int, configs: dict[str, MixerConfig]) -> list[list[Tensor]]:
    axis = open_axes(Degrees(cp=size), rank).cp
    return [on_axis(axis, fault.how, configs[fault.name], fault.case, fault.shift) for fault in FAULTS]


def test_every_fault_shows() -> None:
    found = run_world(2, with_faults, {name: config_of(name) for name in FIELDS})
    for index, fault in enumerate(FAULTS):
        expected = alone(config_of(fault.name), fault.case)
        ours = summed([rank[index] for rank in found])
        assert (relative(ours[0], expected[0]) > 1e-2) == fault.spoils_output, fault
        assert worst(ours[1:], expected[1:]) > 1e-2, fault


def moved_bytes(rank: int, size: int, configs: list[MixerConfig], lengths: list[int]) -> list[list[int]]:
    """Bytes that this rank sends to others in forward and backward of each mixer, at each length."""
    axis, sent = open_axes(Degrees(cp=size), rank).cp, [0]
    move = dist.all_to_all_single

    def counting(out: Tensor, x: Tensor, received: list[int], parts: list[int], **options: Any) -> None:
        sent[0] += (x.shape[0] - parts[rank]) * x[:1].numel() * x.element_size()
        move(out, x, received, parts, **options)

    totals = []
    with mock.patch.object(dist, "all_to_all_single", counting):
        for config in configs:
            mixer, totals_of_one = build(config), []
            for tokens in lengths:
                case, sent[0] = Case(tokens, ((0,), (0, 7))), 0
                x, weight = (cut_row(part, axis) for part in drawn(case))
                outcome(mixer, x, weight, cut(packed(case), axis, Chunks))
                totals_of_one.append(sent[0])
            totals.append(totals_of_one)
    return totals


def test_bytes_do_not_grow_with_the_row() -> None:
    names = [name for name in FIELDS if name != "conv"]
    found = run_world(4, moved_bytes, [config_of(name) for name in names], [64, 256])
    for index, name in enumerate(names):
        for rank in found:
            short, long = rank[index]
            assert short == long > 0, name
    # Lightning has no halo. 4 heads on 4 ranks, 2 rows: one head of each chunk stays on its rank.
    heads, keys, values, chunks, wide = 4, 8, 12, 4, 8
    forward = keys * values + 2 + keys * values
    assert {rank[names.index("lightning learned")][0] for rank in found} == {
        (heads - 1) * chunks * (forward + 2 * keys * values) * wide
    }


@pytest.mark.parametrize("name", FIELDS)
def test_lower_precision_is_float64_rounded(name: str) -> None:
    axis = Axis("cp", 0, (0,), None)
    for dtype in (torch.float32, torch.bfloat16):
        mixer, (x, weight) = build(config_of(name)).float(), drawn(PACKED)
        found = outcome(mixer, x.to(dtype), weight.to(dtype), cut(packed(PACKED), axis, Chunks))
        assert found[0].dtype == dtype
        assert_rounds(found, mixer, x.to(dtype), weight.to(dtype), PACKED)


def assert_rounds(found: list[Tensor], mixer: Mixer, x: Tensor, weight: Tensor, case: Case) -> None:
    """Output and gradients are those of one process in float64, up to rounding to the dtype of x."""
    exact, sequence = deepcopy(mixer).double(), packed(case)

    def truth(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        call = function_of(exact, sequence)
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *parameters)]
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad((out * weight.double()).sum(), leaves)]

    names = ["out", "x", *(name for name, _ in mixer.named_parameters())]
    assert_rounded(found, truth, [x, *mixer.parameters()], dtype=x.dtype, names=names)


@pytest.mark.parametrize("name", STATES)
def test_recomputed_layers_are_the_same(name: str) -> None:
    axis = Axis("cp", 0, (0,), None)
    mixer, (x, weight) = build(config_of(name)), drawn(PACKED)
    sequence = cut(packed(PACKED), axis, Chunks)
    x.requires_grad_()
    out = checkpoint(mixer, x, sequence, use_reentrant=False)
    grads = torch.autograd.grad((out * weight).sum(), [x, *mixer.parameters()])
    assert worst([out.detach(), *grads], alone_all()[name, PACKED]) < 1e-12


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["gdn", "kda", "lightning learned"])
def test_two_chunks_in_triton(name: str) -> None:
    # Only in the interpreter, whose patches the rest must not meet.
    from kernels.interpreter import corrected

    axis, case = Axis("cp", 0, (0,), None), CASES[-1]
    x, weight = (part.float() for part in drawn(case))
    backends = dict.fromkeys(("delta_rule", "linear_attention", "convolution"), "triton")
    with corrected(), use_backends(backends):
        mixer, sequence = build(config_of(name)).float(), cut(packed(case), axis, Chunks)
        found = outcome(mixer, x, weight, sequence)
    assert_rounds(found, mixer, x, weight, case)
