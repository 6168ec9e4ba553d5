"""Which layers each stage of a pipeline has: cut by cost, or as a line says.

Layers of a hybrid model differ, and by how much depends on the context length: at 128K tokens a layer of full
attention outweighs many linear ones, at 4K it does not. So the best cut depends on it too.

A stage has a layer at least. The embedding goes with the first layer; last norm, head and modules that
predict ahead go with the last.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from conf.compose import did_you_mean
from conf.errors import ConfigError, Violation
from model.config import Architecture
from model.count import LayerCount, count
from model.layout import NONE, SHORTCUT, parse

KEY = "parallel.pp_layout"
EMBEDDING, HEAD = "E", "H"
# What an H100 computes while it moves one byte: 0.7 of 989e12 operations to 0.88 of 3.35e12 bytes a second.
OPERATIONS_PER_BYTE = 235.0


class Cost(NamedTuple):
    """Time per token in floating-point operations: forward, then backward for inputs and for weights."""

    forward: float
    input: float
    weight: float

    @property
    def total(self) -> float:
        """A whole training step."""
        return sum(self)


def sum_costs(costs: Sequence[Cost]) -> Cost:
    """What they take one after the other."""
    return Cost(*(sum(part) for part in zip(*costs, strict=True)))


def layer_costs(config: Architecture, context: int) -> list[Cost]:
    """The cost of each layer at `context` tokens, ends of the model included.

    A product with weights costs as much for its inputs and for its weights as forward. The mixing itself has
    no weights: backward of attention is 2.5 times forward, as it computes its scores again, of a state 2.
    """
    counts, shape = count(config), config.model
    costs = [_layer_cost(config, layer, context) for layer in counts.layers]
    # Two bytes per element are read and written; backward adds two-byte gradients to four-byte sums.
    moved = OPERATIONS_PER_BYTE * shape.width
    costs[0] = sum_costs([costs[0], Cost(4 * moved, 0.0, 10 * moved)])
    head = 2.0 * shape.width * shape.vocab_size
    ends = [_layer_cost(config, layer, context) for layer in counts.predictions]
    ends += [Cost(head, head, head)] * (1 + len(ends))
    costs[-1] = sum_costs([costs[-1], *ends])
    return costs


def _layer_cost(config: Architecture, layer: LayerCount, context: int) -> Cost:
    linear = 2.0 * (layer.ffn_params + layer.active + layer.norm_params)
    if layer.mixer == NONE:
        return Cost(linear, linear, linear)
    mixer = config.mixer[layer.mixer]
    flops = mixer.flops(config.model.width, context)
    linear += flops.projections
    again = 2.5 if mixer.context.exchange == "gather" else 2.0
    return Cost(linear + flops.core, linear + again * flops.core, linear)


def stage_costs(config: Architecture, stages: Sequence[range], context: int) -> list[Cost]:
    """The cost of each stage per token."""
    costs = layer_costs(config, context)
    return [sum_costs([costs[layer] for layer in stage]) for stage in stages]


def joined_layers(config: Architecture) -> dict[int, str]:
    """The layers that must be on the stage of the one before, and why."""
    found: dict[int, str] = {}
    layers, maker = config.layers, 0
    for index, layer in enumerate(layers):
        selection = None if layer.mixer == NONE else config.mixer[layer.mixer].selection
        if selection == "makes":
            maker = index
        if selection == "reads":
            reason = f"layer {index} shares the keys that layer {maker} chose"
            found |= {between: reason for between in range(maker + 1, index + 1) if between not in found}
        if index and layers[index - 1].ffn == SHORTCUT:
            found[index] = f"the experts of layer {index - 1} join the stream in layer {index}"
    return dict(sorted(found.items()))


def stage_layers(
    config: Architecture, degree: int, chunks: int, context: int, layout: str | None = None
) -> list[range]:
    """The layers of each of the degree x chunks stages: as `layout` says, else cut by cost at `context`.

    Raises ConfigError with everything that is wrong.
    """
    stages = degree * chunks
    if layout is not None:
        return read_layout(config, stages, layout)
    joined = joined_layers(config)
    pieces = config.model.depth - len(joined)
    if stages > pieces:
        reasons = f", since {next(iter(joined.values()))} and so on" if joined else ""
        message = f"{degree} x {chunks} stages, but the {config.model.depth} layers make {pieces} pieces"
        raise ConfigError([Violation("parallel.pp", f"{message}{reasons}; use {pieces} stages or fewer")])
    return partition([cost.total for cost in layer_costs(config, context)], stages, joined)


def equal_layers(config: Architecture, stages: int) -> list[range]:
    """As many layers on each stage as can be, whatever they cost, the longer stages first.

    Where a cut would part layers that belong together it moves to the nearest place that does not.
    """
    depth, joined = config.model.depth, joined_layers(config)
    free = [place for place in range(1, depth) if place not in joined]
    edges = [0]
    for stage in range(1, stages):
        even = stage * (depth // stages) + min(stage, depth % stages)
        # Later stages need a place each as well.
        open_places = [place for place in free[: len(free) - (stages - 1 - stage)] if place > edges[-1]]
        edges.append(min(open_places, key=lambda place: abs(place - even)))
    return _ranges([*edges, depth])


def partition(costs: Sequence[float], stages: int, joined: Sequence[int] | dict[int, str]) -> list[range]:
    """Neighbouring items in `stages` groups whose most costly one costs as little as can be.

    No group starts at an item of `joined`. Among the cuts that are best so, the one with the smallest sum of
    squares. Exact; costs are at least 0. O(stages items^2). Raises ValueError if there are fewer places.
    """
    places = [place for place in range(1, len(costs)) if place not in joined]
    if not 1 <= stages <= len(places) + 1:
        raise ValueError(f"stages: expected 1 to {len(places) + 1}, found {stages}")
    sums = list(accumulate(costs, initial=0.0))
    edges = [0, *places, len(costs)]
    # The slack is for the rounding of differences of sums.
    limit = _best_cut(edges, stages, lambda a, b: sums[b] - sums[a], max)[0] * (1 + 1e-12)

    def square(a: int, b: int) -> float:
        cost = sums[b] - sums[a]
        return cost**2 if cost <= limit else math.inf

    return _ranges(_best_cut(edges, stages, square, lambda a, b: a + b)[1])


def _best_cut(
    edges: Sequence[int],
    stages: int,
    value: Callable[[int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The least joined value of `stages` groups between the first and the last edge, and their edges."""
    best: list[tuple[float, list[int]]] = [(value(edges[0], edge), [edges[0], edge]) for edge in edges]
    for stage in range(2, stages + 1):
        following = list(best)
        for end in range(stage, len(edges)):
            options = (
                (join(best[start][0], value(edges[start], edges[end])), start)
                for start in range(stage - 1, end)
            )
            least, start = min(options)
            following[end] = (least, [*best[start][1], edges[end]])
        best = following
    return best[-1]


def _ranges(edges: Sequence[int]) -> list[range]:
    return [range(*pair) for pair in pairwise(edges)]


def write_layout(config: Architecture, stages: Sequence[range]) -> str:
    """The line that `read_layout` reads: mixers of each stage, equal neighbours as 3*gdn."""
    lines = []
    for stage in stages:
        runs: list[tuple[str, int]] = []
        for name in (config.layers[layer].mixer for layer in stage):
            repeats = runs.pop()[1] if runs and runs[-1][0] == name else 0
            runs.append((name, repeats + 1))
        lines.append(" ".join(name if repeats == 1 else f"{repeats}*{name}" for name, repeats in runs))
    return f"{EMBEDDING} {' | '.join(lines)} {HEAD}"


def read_layout(config: Architecture, stages: int, layout: str) -> list[range]:
    """The layers of each stage of a line such as "E 3*gdn attn | 3*gdn attn H".

    E is the embedding, H the head with all that stands before it; between are the mixers of the layers,
    repeats before or behind a name, groups as in a layout. Raises ConfigError with everything that is wrong.
    """
    found: list[str] = []
    named = [_read_stage(config, stage, text, found) for stage, text in enumerate(layout.split("|"))]
    if len(named) != stages:
        found.append(f"{len(named)} stages; expected {stages}, one for each rank and chunk")
    _check_ends(named, found)
    layers = [[name for name in names if name not in (EMBEDDING, HEAD)] for names in named]
    edges = list(accumulate((len(names) for names in layers), initial=0))
    if edges[-1] != config.model.depth:
        found.append(f"the stages name {edges[-1]} layers; expected {config.model.depth}")
    _check_layers(config, layers, edges, found)
    if found:
        raise ConfigError([Violation(KEY, message) for message in found])
    return _ranges(edges)


def _read_stage(config: Architecture, stage: int, text: str, found: list[str]) -> tuple[str, ...]:
    try:
        names = parse(re.sub(r"([A-Za-z_]\w*)\s*\*\s*(\d+)", r"\2*\1", text))
    except ValueError as error:
        found.append(f"stage {stage}: {error}")
        return ()
    known = sorted({*config.mixer, NONE})
    for name in sorted({*names} - {*known, EMBEDDING, HEAD}):
        hint = did_you_mean(name, known)
        found.append(f"stage {stage}: {name!r} is not one of E, H, {', '.join(known)}{hint}")
    if not {*names} - {EMBEDDING, HEAD}:
        found.append(f"stage {stage}: names no layer; a stage needs one at least")
    return names


def _check_ends(named: Sequence[Sequence[str]], found: list[str]) -> None:
    last = len(named) - 1
    for stage, names in enumerate(named):
        for name, home, place in ((EMBEDDING, 0, 0), (HEAD, last, len(names) - 1)):
            places = [index for index, other in enumerate(names) if other == name]
            if places != ([place] if stage == home else []):
                where = "first in stage 0" if name == EMBEDDING else f"last in stage {last}"
                items = f"items {', '.join(map(str, places))}" if places else "none"
                found.append(f"stage {stage}: {name} stands once, {where}; found it at {items}")


def _check_layers(
    config: Architecture, layers: Sequence[Sequence[str]], edges: Sequence[int], found: list[str]
) -> None:
    real, joined = config.layers, joined_layers(config)
    for stage, names in enumerate(layers):
        for layer, name in enumerate(names, edges[stage]):
            if layer >= len(real) or name != real[layer].mixer:
                expected = f"expected {real[layer].mixer}" if layer < len(real) else "the model ends before"
                found.append(f"stage {stage}: layer {layer} is named {name}; {expected}")
                break  # what follows is shifted
        if stage and edges[stage] in joined and names:
            found.append(f"stage {stage}: begins with layer {edges[stage]}, but {joined[edges[stage]]}")
