"""Megatron-Core's calls of DeepEP and our dispatch by them, on CPU ranks over a double of deep_ep.

Everything is compared with one process that goes through tokens and experts one at a time.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError
from kernels.experts import ExpertBiases, ExpertForm, routed_experts
from kernels.experts.reference import experts_direct
from parallel.config.degrees import Degrees
from parallel.mesh.axes import open_axes
from parallel.shard.deepep import DeepEP, Fused, open_deepep
from tests.closeness import DRAWS, assert_within, distance, length, limits_of, moved_by
from tests.parallel import deep_ep_double
from tests.parallel.layouts import alone, apart, architecture_of, assembled, on_rank
from tests.worlds import run_world

EXPERTS, TOP_K, WIDTH, HIDDEN = 8, 3, 16, 16
CPU = torch.device("cpu")
FORMS = {
    "plain": ExpertForm(),
    "scaled input": ExpertForm(scales_input=True),
    "biased": ExpertForm(limit=2.0),
}


class Rows(NamedTuple):
    """Tokens of a rank, what they chose with what weights, and the gradient of what comes out."""

    x: Tensor
    chosen: Tensor
    weights: Tensor
    grad: Tensor


# The choices of n tokens on a rank; ids from EXPERTS on are of no expert.
CHOICES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "any": lambda n, draw: torch.rand(n, EXPERTS, generator=draw).argsort(1)[:, :TOP_K],
    "any or none": lambda n, draw: torch.rand(n, 2 * EXPERTS, generator=draw).argsort(1)[:, :TOP_K],
    "one expert": lambda n, _: torch.tensor([[8, 5, 9]]).expand(n, -1),
    "one rank": lambda n, _: torch.tensor([[1, 0, 9]]).expand(n, -1),
    "pairs on a rank": lambda n, _: torch.tensor([[1, 6, 0], [4, 3, 5], [2, 3, 9]]).repeat(n, 1)[:n],
    "nothing": lambda n, _: torch.tensor([[8, 9, 10]]).expand(n, -1),
    "a rank without tokens": lambda n, draw: torch.rand(n, EXPERTS, generator=draw).argsort(1)[:, :TOP_K],
}


def rows_of(case: str, size: int) -> list[Rows]:
    draw = torch.Generator().manual_seed(len(case))
    found = []
    for rank in range(size):
        count = 0 if rank == 0 and case == "a rank without tokens" else 9 + 4 * rank
        x, grad = torch.randn(2, count, WIDTH, generator=draw, dtype=torch.float64)
        # DeepEP takes float32 weights: these are exact in it.
        weights = torch.rand(count, TOP_K, generator=draw).double()
        found.append(Rows(x, CHOICES[case](count, draw).contiguous(), weights, grad))
    return found


def parameters_of(form: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    shapes = {"gate_up": (EXPERTS, 2 * HIDDEN, WIDTH), "down": (EXPERTS, WIDTH, HIDDEN)}
    if form == "biased":
        shapes |= {"up_bias": (EXPERTS, 2 * HIDDEN), "down_bias": (EXPERTS, WIDTH)}
    found = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return found | {"shared": torch.randn(WIDTH, generator=draw, dtype=torch.float64)}


def biases_of(parameters: dict[str, Tensor]) -> ExpertBiases | None:
    if "up_bias" not in parameters:
        return None
    return ExpertBiases(parameters["up_bias"], parameters["down_bias"])


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def truth(case: str, form: str, size: int, draw: int | None = None) -> dict[str, list[Tensor]]:
    """By name what each rank should have, calculated in one place; draw: of moved inputs."""
    rows, parameters = rows_of(case, size), parameters_of(form)
    inputs = [torch.cat([getattr(part, name) for part in rows]) for name in ("x", "weights")]
    inputs = [*inputs, *parameters.values()]
    inputs = inputs if draw is None else moved_by(inputs, torch.finfo(torch.float32).eps, draw)
    x, weights, *leaves = map(leaf, inputs)
    parameters = dict(zip(parameters, leaves, strict=True))
    chosen, grad = (torch.cat([getattr(part, name) for part in rows]) for name in ("chosen", "grad"))
    gate_up, down = parameters["gate_up"], parameters["down"]
    out = experts_direct(x, gate_up, down, chosen, weights, FORMS[form], biases_of(parameters))
    out = out + x * parameters["shared"]
    ((out * grad).sum() + sum(0.0 * p.sum() for p in (weights, *parameters.values()))).backward()
    counts = [len(part.x) for part in rows]
    assert x.grad is not None
    assert weights.grad is not None
    found = {"out": list(out.detach().split(counts)), "x": list(x.grad.split(counts))}
    found["weights"] = list(weights.grad.split(counts))
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        is_shared = name == "shared"
        found[name] = [parameter.grad] * size if is_shared else list(parameter.grad.chunk(size))
    return found


def step(rank: int, size: int, case: str, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What this rank finds of `truth`."""
    axis = open_axes(Degrees(dp_shard=size, ep=size), rank).ep
    held, shape = EXPERTS // size, FORMS[form]
    own = rows_of(case, size)[rank]
    x, weights = leaf(own.x.to(dtype)), leaf(own.weights.to(dtype))
    parts = {
        name: leaf((p if name == "shared" else p.chunk(size)[rank]).to(dtype))
        for name, p in parameters_of(form).items()
    }

    def run(rows: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
        return routed_experts(rows, parts["gate_up"], parts["down"], ids, scale, shape, biases_of(parts))

    dispatch = open_deepep(axis, CPU)(axis, held, shape.scales_input)
    out, shared = dispatch(x, own.chosen, weights, run, lambda: x * parts["shared"])
    assert shared is not None
    out = out + shared
    (out * own.grad.to(dtype)).sum().backward()
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    found |= {name: p.grad for name, p in parts.items()}
    torch.distributed.all_reduce(found["shared"])
    return {name: part for name, part in found.items() if part is not None}


def steps(rank: int, size: int, dtype: torch.dtype, fault: str = "none") -> dict[tuple[str, str], Any]:
    """Every case in every form; a faulty double only the first."""
    deep_ep_double.install()
    deep_ep_double.skip_packages()
    deep_ep_double.Buffer.fault = fault
    cases = [(case, form) for case in CHOICES for form in FORMS] if fault == "none" else [("any", "plain")]
    return {(case, form): step(rank, size, case, form, dtype) for case, form in cases}


def wrong(case: str, form: str, ranks: list[dict[str, Tensor]], dtype: torch.dtype) -> dict[str, float]:
    """By name how far a rank is from the truth where that is too far; infinite where something is missing.

    Weights and their gradients travel in float32, whatever the tokens are in.
    """
    size = len(ranks)
    true, *moved = (truth(case, form, size, draw) for draw in (None, *range(DRAWS)))
    flat = [[part for parts in found.values() for part in parts] for found in (true, *moved)]
    limits = iter(limits_of(flat[0], flat[1:], torch.float32))
    off: dict[str, float] = {}
    for name, parts in true.items():
        for found, part in zip(ranks, parts, strict=True):
            limit = next(limits)
            is_exact = dtype == torch.float64 and name != "weights"
            far = distance(found[name], part) if name in found else float("inf")
            # Not "above": a NaN is wrong too.
            if not far <= (1e-12 * length(part) if is_exact else limit):
                off[name] = max(far, off.get(name, 0.0))
    return off


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [2, 4])
def test_tokens_find_their_experts_and_gradients_their_way_back(size: int, dtype: torch.dtype) -> None:
    ranks = run_world(size, steps, dtype, timeout=300)
    found = {key: wrong(*key, [rank[key] for rank in ranks], dtype) for key in ranks[0]}
    assert len(found) == len(CHOICES) * len(FORMS)
    assert not {key: off for key, off in found.items() if off}


# What a fault must show in, at least.
FAULTS = {
    "probability": {"out", "x", "gate_up", "down"},
    "lost token": {"out", "weights", "gate_up", "down"},
    "expert": {"out", "x", "weights", "gate_up", "down"},
    "unsummed gradient": {"weights"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_under_way_is_seen(fault: str) -> None:
    ranks = run_world(2, steps, torch.float32, fault)
    off = wrong("any", "plain", [rank["any", "plain"] for rank in ranks], torch.float32)
    assert FAULTS[fault] <= set(off)


def first_choice_alone(case: str, form: str, size: int) -> dict[str, list[Tensor]]:
    stock = rows_of(case, size)
    cut = [
        part._replace(chosen=torch.where(torch.arange(TOP_K) == 0, part.chosen, EXPERTS)) for part in stock
    ]
    with patch(f"{__name__}.rows_of", lambda *_: cut):
        return truth(case, form, size)


def test_the_truth_itself_depends_on_every_choice() -> None:
    all_of_it, first = truth("any", "plain", 2), first_choice_alone("any", "plain", 2)
    assert all(apart(first[name][0], all_of_it[name][0]) > 1e-2 for name in all_of_it if name != "shared")


def on_layout(rank: int, size: int, degrees: Degrees, recompute: str) -> Any:
    deep_ep_double.install()
    deep_ep_double.skip_packages()
    keys = {"ep_dispatch": "deepep", "recompute": recompute}
    found = on_rank(rank, size, architecture_of(mixers=MIXERS), degrees, "", keys)
    assert deep_ep_double.Buffer.built == 1
    return found


MIXERS = ("lightning", "attn", "gdn")
LAYOUTS = {
    "tp2-ep2": (Degrees(tp=2, ep=2), "none"),
    "dp2-ep2-recompute": (Degrees(dp_shard=2, ep=2), "full"),
    "cp2-tp2-ep2": (Degrees(cp=2, tp=2, ep=2), "none"),
    "dp2-tp2-ep4": (Degrees(dp_shard=2, tp=2, ep=4), "none"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(layout: str) -> None:
    degrees, recompute = LAYOUTS[layout]
    reference, *moved = (alone(architecture_of(mixers=MIXERS), draw) for draw in (None, *range(DRAWS)))
    ranks = run_world(degrees.size, on_layout, degrees, recompute, timeout=300)
    found = assembled(reference, ranks)
    # Weights travel in float32 beside float64 tokens.
    for kind in ("losses", "grads"):
        true = getattr(reference, kind)
        names = [name for name in true if name != "load"]
        parts, expected, *others = (
            [getattr(result, kind)[name] for name in names] for result in (found, reference, *moved)
        )
        assert_within(parts, expected, limits_of(expected, others, torch.float32), names=names)


def whole_megatron(rank: int, size: int) -> dict[str, Tensor]:
    deep_ep_double.install()
    return step(rank, size, "any", "plain", torch.float32)


@pytest.mark.prove
def test_megatron_core_imported_as_a_whole_does_the_same() -> None:
    ranks = run_world(2, whole_megatron, timeout=500)
    assert not wrong("any", "plain", ranks, torch.float32)


def opened(rank: int, size: int, *, on: tuple[str, ...], has_deep_ep: bool) -> list[str]:
    """What keeps an axis of all ranks, on these nodes, from being opened."""
    if has_deep_ep:
        deep_ep_double.install()
    deep_ep_double.skip_packages()
    axis = open_axes(Degrees(dp_shard=size, ep=size), rank).ep
    try:
        with patch.object(socket, "gethostname", lambda: on[rank]):
            open_deepep(axis, CPU)
    except ConfigError as error:
        return [f"{found.key}: {found.message}" for found in error.violations]
    return []


def opened_on_one(rank: int, size: int) -> list[str]:
    return opened(rank, size, on=("a", "a"), has_deep_ep=True)


def opened_on_two(rank: int, size: int) -> list[str]:
    return opened(rank, size, on=("a", "b"), has_deep_ep=True)


def opened_without(rank: int, size: int) -> list[str]:
    return opened(rank, size, on=("a", "a"), has_deep_ep=False)


def test_neighbours_on_other_nodes_are_refused() -> None:
    assert run_world(2, opened_on_one) == [[], []]
    for (found,) in run_world(2, opened_on_two):
        assert found.startswith("parallel.ep: parallel.ep_dispatch=deepep wants ranks 0 to 1 on one node;")


def test_a_deep_ep_that_megatron_core_cannot_import_is_refused() -> None:
    for (found,) in run_world(2, opened_without):
        assert found.startswith("parallel.ep_dispatch: deepep: Megatron-Core 0.16.1 cannot import deep_ep;")


class NotedStream(torch.cuda.Stream):
    """A stream of no device that notes what it waits for."""

    device = CPU

    def __new__(cls, name: str, events: list[str]) -> "NotedStream":
        return object.__new__(cls)

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, stream: "NotedStream") -> None:
        self.events.append(f"{self.name} waits for {stream.name}")


def ordered(rank: int, size: int) -> list[str]:
    """What happens on which stream, with streams and Megatron-Core's calls replaced by notes."""
    events: list[str] = []
    main, beside = NotedStream("main", events), NotedStream("beside", events)
    current = [main]

    @contextmanager
    def on(stream: NotedStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def note(what: str) -> None:
        events.append(f"{what} on {current[-1].name}")

    def send(x: Tensor, ids: Tensor, weights: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        note("dispatch")
        return x, ids, weights, torch.tensor([ids.numel()]), None

    def back(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        note("combine")
        return x, None

    def run(rows: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
        note("experts")
        return rows

    dispatch = DeepEP(open_axes(Degrees(), 0).ep, EXPERTS, False, Fused(send, back), beside)
    own = rows_of("any", 1)[0]
    with (
        patch.object(torch.cuda, "stream", on),
        patch.object(torch.cuda, "current_stream", lambda device: current[-1]),
        patch.object(Tensor, "record_stream", lambda x, stream: events.append(f"kept for {stream.name}")),
    ):
        dispatch(own.x, own.chosen, own.weights, run, lambda: note("shared"))
    return events


def test_tokens_leave_beside_the_stream_of_the_shared_expert() -> None:
    (events,) = run_world(1, ordered, initialise=False)
    # The stream beside waits before the shared expert is enqueued, the main one only after it.
    start = ["beside waits for main", "shared on main", "dispatch on beside", "main waits for beside"]
    assert events == [*start, *["kept for main"] * 3, "experts on main", "combine on main"]
