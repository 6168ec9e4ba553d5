"""Which layers each stage of a pipeline has: cut by cost, or as a line says.

Layers of a hybrid model differ, and by how much depends on the context length: at 128K tokens a layer of full
attention outweighs many linear ones, at 4K it does not. So the best cut depends on it too.

A stage has a layer at least. The embedding goes with the first layer; last norm, head and MTP modules
go with the last.
"""

import math
import re
from collections.abc import Callable, Container, Sequence
from itertools import accumulate, pairwise

from conf.errors import ConfigError, Violation
from conf.known_keys import did_you_mean
from model.config import Architecture
from model.layout import NONE, SHORTCUT, parse
from parallel.config.parallel import ParallelConfig
from parallel.config.pipeline import PipelinePlan
from parallel.pipeline.cost import layer_costs, stage_costs
from parallel.pipeline.timeline import simulate

KEY = "parallel.pp_layout"
EMBEDDING, HEAD = "E", "H"


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
    config: Architecture, plan: PipelinePlan, context: int, layout: str | None = None
) -> list[range]:
    """The layers of each stage of the plan: as `layout` says, else cut by cost at `context` tokens.

    The fastest in simulation of three: the cut whose most costly stage costs the least; where ranks have
    several stages, the same with ranks levelled, which is better for some schedules and worse for others; and
    as many layers for each stage.
    Raises ConfigError with everything that is wrong.
    """
    if layout is not None:
        return read_layout(config, plan.stages, layout)
    joined = joined_layers(config)
    pieces = config.model.depth - len(joined)
    if plan.stages > pieces:
        reasons = f", since {next(iter(joined.values()))} and so on" if joined else ""
        message = f"{plan.degree} x {plan.chunks} stages, but the {config.model.depth} layers make {pieces}"
        message += f" pieces{reasons}; use {pieces} stages or fewer"
        raise ConfigError([Violation("parallel.pp", message)])
    costs = [cost.total for cost in layer_costs(config, context)]
    cut = partition(costs, plan.stages, joined)
    found = [cut, equal_layers(config, plan.stages)]
    if plan.chunks > 1:
        homes = {stage: rank for rank in range(plan.degree) for stage in plan.stages_of(rank)}
        found.insert(1, level_ranks(costs, cut, [homes[stage] for stage in range(plan.stages)], joined))
    return min(found, key=lambda each: simulate(plan, stage_costs(config, each, context)).span)


def stage_violations(config: Architecture, parallel: ParallelConfig, tokens: int) -> list[Violation]:
    """What keeps the layers from being the stages of the pipeline; tokens is the length of a row."""
    # How layers are cut where nothing is said depends on the micro-batches; whether they can be does not.
    plan = parallel.plan(parallel.pp * (parallel.pp_chunks or 2))
    if plan is None:
        return []
    try:
        stage_layers(config, plan, tokens, parallel.pp_layout)
    except ConfigError as error:
        return list(error.violations)
    return []


def equal_layers(config: Architecture, stages: int) -> list[range]:
    """As many layers on each stage as can be, whatever they cost, the longer stages first.

    Where a cut would part layers that belong together it moves to the nearest boundary that does not.
    """
    depth, joined = config.model.depth, joined_layers(config)
    free = [boundary for boundary in range(1, depth) if boundary not in joined]
    edges = [0]
    for stage in range(1, stages):
        even = stage * (depth // stages) + min(stage, depth % stages)
        # Later stages need a boundary each as well.
        open_boundaries = [
            boundary for boundary in free[: len(free) - (stages - 1 - stage)] if boundary > edges[-1]
        ]
        edges.append(min(open_boundaries, key=lambda boundary: abs(boundary - even)))
    return _ranges([*edges, depth])


def partition(costs: Sequence[float], stages: int, joined: Container[int]) -> list[range]:
    """Neighbouring items in `stages` groups whose most costly one costs as little as can be.

    No group starts at an item of `joined`. Among the cuts that are best so, the one with the smallest sum of
    squares. Exact; costs are at least 0. O(stages items^2). Raises ValueError if there are fewer boundaries.
    """
    boundaries = [boundary for boundary in range(1, len(costs)) if boundary not in joined]
    if not 1 <= stages <= len(boundaries) + 1:
        raise ValueError(f"stages: expected 1 to {len(boundaries) + 1}, found {stages}")
    sums = list(accumulate(costs, initial=0.0))
    edges = [0, *boundaries, len(costs)]
    # The slack is for the rounding of differences of sums.
    limit = _best_cut(edges, stages, lambda a, b: sums[b] - sums[a], max)[0] * (1 + 1e-12)

    def square(a: int, b: int) -> float:
        cost = sums[b] - sums[a]
        return cost**2 if cost <= limit else math.inf

    return _ranges(_best_cut(edges, stages, square, lambda a, b: a + b)[1])


def level_ranks(
    costs: Sequence[float], cut: Sequence[range], homes: Sequence[int], joined: Container[int]
) -> list[range]:
    """The cut with its edges moved so that the most costly rank costs less, where there is such a move.

    homes are the ranks of the stages. No stage becomes more costly than the most costly one of `cut`. A local
    search: it ends where no single edge can move to advantage.
    """
    sums = list(accumulate(costs, initial=0.0))
    edges = [0, *(stage.stop for stage in cut)]
    limit = max(sums[b] - sums[a] for a, b in pairwise(edges)) * (1 + 1e-12)

    def score(edges: Sequence[int]) -> tuple[float, float]:
        loads = [0.0] * (max(homes) + 1)
        for home, (a, b) in zip(homes, pairwise(edges), strict=True):
            if sums[b] - sums[a] > limit:
                return math.inf, math.inf
            loads[home] += sums[b] - sums[a]
        # Rounded, so that the same loads in another order are not an advantage.
        return round(max(loads) / sums[-1], 12), round(sum(load**2 for load in loads) / sums[-1] ** 2, 12)

    best, is_moving = score(edges), True
    while is_moving:
        is_moving = False
        for index in range(1, len(edges) - 1):
            for boundary in range(edges[index - 1] + 1, edges[index + 1]):
                trial = [*edges[:index], boundary, *edges[index + 1 :]]
                if boundary not in joined and (found := score(trial)) < best:
                    edges, best, is_moving = trial, found, True
    return _ranges(edges)


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
        for name, home, boundary in ((EMBEDDING, 0, 0), (HEAD, last, len(names) - 1)):
            boundaries = [index for index, other in enumerate(names) if other == name]
            if boundaries != ([boundary] if stage == home else []):
                where = "first in stage 0" if name == EMBEDDING else f"last in stage {last}"
                items = f"items {', '.join(map(str, boundaries))}" if boundaries else "none"
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
