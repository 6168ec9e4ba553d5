"""Layers, micro-batches and pipeline ranks that represent others like them: few are played for many.

A layer adds the same parameters and the same collectives wherever it stands among others of its kind, and a
micro-batch the same collectives whichever it is. So what all of them have is a weighted sum over plays with
a few of them: one with a layer of each kind, and for each kind one with another layer of it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from model.config import Architecture
from parallel.config.pipeline import PipelinePlan, plan_violations
from parallel.pipeline.partition import joined_layers
from parallel.pipeline.schedules import action_order
from parallel.rehearsal.collective_trace import Collective, sent_bytes

Weight: TypeAlias = int | Fraction


class Sample(NamedTuple):
    """Some layers of the model, and how often what is found with them counts; less than 0 takes away."""

    layers: tuple[int, ...]
    weight: int


def samples(config: Architecture, stages: Iterable[range]) -> list[Sample]:
    """What to play instead of all layers of some stages. Weights sum to one.

    The ends of a stage are always there. Where layers hand something on beside the stream, all are
    played.
    """
    layers, stages = config.layers, list(stages)
    whole = tuple(sorted(layer for stage in stages for layer in stage))
    if joined_layers(config):
        return [Sample(whole, 1)]
    some: set[int] = set()
    left: list[list[int]] = []
    for stage in stages:
        own = {stage[0], stage[-1]}
        # Not a set: the order of plays must not change from process to process.
        for kind in dict.fromkeys(layers[layer] for layer in stage):
            alike = [layer for layer in stage if layers[layer] == kind]
            own |= set() if own & set(alike) else {alike[0]}
            left.append([layer for layer in alike if layer not in own])
        some |= own
    more = [Sample(tuple(sorted(some | {rest[0]})), len(rest)) for rest in left if rest]
    return [Sample(tuple(sorted(some)), 1 - sum(sample.weight for sample in more)), *more]


def micro_batches(plan: PipelinePlan) -> list[tuple[int, Weight]]:
    """Two numbers of micro-batches that the schedule runs instead of the plan's, and their weights."""
    legal = (n for n in range(1, plan.micro_batches) if not plan_violations(plan._replace(micro_batches=n)))
    few = [n for n, _ in zip(legal, range(2), strict=False)]
    if len(few) < 2:
        return [(plan.micro_batches, 1)]
    weight = Fraction(plan.micro_batches - few[0], few[1] - few[0])
    return [(few[0], 1 - weight), (few[1], weight)]


def equivalent_ranks(
    config: Architecture, plan: PipelinePlan, cut: Sequence[range], *, gathers_again: bool
) -> list[int]:
    """For each rank of a pipeline the first rank whose step has the same collectives, between other ranks.

    So they are where stages have layers of the same kinds, the same neighbours and as many actions of each
    kind: what is sent and gathered must not depend on the order of actions. `cut` are the layers of all
    stages; `gathers_again` says that weights are freed after forward.
    """
    # 1F1B frees weights in forward and keeps them in backward, the others keep those of three stages: what
    # is gathered is then a matter of what ran before.
    if joined_layers(config) or plan.chunks > 3 or (plan.schedule == "1f1b" and gathers_again):
        return list(range(plan.degree))
    orders = [action_order(plan._replace(micro_batches=count)) for count, _ in micro_batches(plan)]
    last = plan.stages - 1

    def likeness(pp_rank: int) -> Any:
        own = plan.stages_of(pp_rank)
        stages = [
            (stage == 0, stage == last, stage + 1 in own, [config.layers[layer] for layer in cut[stage]])
            for stage in own
        ]
        actions = [
            Counter((own.index(action.stage), action.kind) for action in order[pp_rank]) for order in orders
        ]
        return stages, actions

    found = [likeness(pp_rank) for pp_rank in range(plan.degree)]
    return [found.index(each) for each in found]


def summed(found: Sequence[tuple[Weight, Any]]) -> Any:
    """The weighted sum of whole numbers, or of those of mappings key by key."""
    first = found[0][1]
    if isinstance(first, dict):
        return {key: summed([(weight, each[key]) for weight, each in found]) for key in first}
    return _whole(sum(weight * each for weight, each in found))


def summed_calls(found: Sequence[tuple[Weight, Sequence[Collective]]]) -> Counter[Collective]:
    """The weighted sum of collectives.

    Where all plays call the same one after the other, only the bytes of a call may differ: what is sent of
    all layers at once. Else the calls themselves are counted.
    """
    orders = {tuple((call.kind, call.ranks) for call in calls) for _, calls in found}
    if len(orders) == 1:
        weights = [weight for weight, _ in found]
        positions = zip(*(calls for _, calls in found), strict=True)
        return Counter(_joined(weights, calls) for calls in positions)
    counts = [(weight, Counter(calls)) for weight, calls in found]
    total = {call: _whole(sum(w * each[call] for w, each in counts)) for each in counts for call in each[1]}
    return Counter({call: count for call, count in total.items() if count})


def _joined(weights: Sequence[Weight], calls: Sequence[Collective]) -> Collective:
    first = calls[0]
    if all(call == first for call in calls):
        return first
    assert first.kind != "all_to_all", f"{calls=} differ in what they send"
    moved = _whole(sum(weight * call.bytes for weight, call in zip(weights, calls, strict=True)))
    return Collective(first.kind, first.ranks, moved, sent_bytes(first.kind, moved, len(first.ranks)))


def _whole(x: Weight) -> int:
    # A count below zero or between two numbers says that what was taken to be alike is not.
    assert x >= 0, f"{x} is no count"
    assert x.denominator == 1, f"{x} is no count"
    return int(x)
