"""The cut of a pipeline is the best one there is, and a line that gives it by hand is read as it says."""

from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conf.compose import compose, group_options
from conf.errors import ConfigError
from model.config import Architecture
from model.count import count
from parallel.config.pipeline import SCHEDULE_KINDS, PipelinePlan
from parallel.pipeline.cost import OPERATIONS_PER_BYTE, layer_costs, stage_costs
from parallel.pipeline.partition import (
    equal_layers,
    joined_layers,
    level_ranks,
    partition,
    read_layout,
    stage_layers,
    write_layout,
)
from tests.architectures import small_architecture

CONTEXTS = (4096, 131072)
SPARSE = small_architecture(["model.depth=9", "layout.pattern=gdn dsa 2*dsa_shared attn"])


def architecture(name: str) -> Architecture:
    return compose([f"model={name}"], Architecture)


def totals(config: Architecture, stages: list[range], context: int) -> list[float]:
    return [cost.total for cost in stage_costs(config, stages, context)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, set[int]]:
    costs = draw(st.lists(st.floats(0.0, 100.0), min_size=2, max_size=9))
    joined = draw(st.sets(st.integers(1, len(costs) - 1), max_size=len(costs) - 2))
    return costs, draw(st.integers(1, len(costs) - len(joined))), joined


def loads(costs: list[float], stages: list[range]) -> list[float]:
    return [sum(costs[item] for item in stage) for stage in stages]


@given(problems())
def test_no_other_cut_is_better(problem: tuple[list[float], int, set[int]]) -> None:
    costs, stages, joined = problem
    found = partition(costs, stages, joined)
    assert [item for stage in found for item in stage] == list(range(len(costs)))
    assert not joined & {stage.start for stage in found}
    boundaries = [boundary for boundary in range(1, len(costs)) if boundary not in joined]
    every = []
    for inner in combinations(boundaries, stages - 1):
        cut = [range(*pair) for pair in pairwise((0, *inner, len(costs)))]
        every.append((max(loads(costs, cut)), sum(load**2 for load in loads(costs, cut))))
    best = min(worst for worst, _ in every)
    assert max(loads(costs, found)) == pytest.approx(best, rel=1e-9, abs=1e-9)
    even = min(squares for worst, squares in every if worst <= best * (1 + 1e-12))
    assert sum(load**2 for load in loads(costs, found)) <= even * (1 + 1e-9) + 1e-9


@given(problems(), st.randoms())
def test_levelled_ranks_are_no_worse(problem: tuple[list[float], int, set[int]], random) -> None:
    costs, stages, joined = problem
    assume(sum(costs))
    homes = [random.randrange(1 + stages // 2) for _ in range(stages)]
    cut = partition(costs, stages, joined)
    level = level_ranks(costs, cut, homes, joined)
    assert [item for stage in level for item in stage] == list(range(len(costs)))
    assert not joined & {stage.start for stage in level}
    assert max(loads(costs, level)) <= max(loads(costs, cut)) * (1 + 1e-9)

    def busiest(stages: list[range]) -> float:
        ranks = [0.0] * (max(homes) + 1)
        for home, load in zip(homes, loads(costs, stages), strict=True):
            ranks[home] += load
        return max(ranks)

    assert busiest(level) <= busiest(cut) * (1 + 1e-9)


@pytest.mark.parametrize("stages", [0, 4])
def test_a_cut_without_places_is_refused(stages: int) -> None:
    with pytest.raises(ValueError, match=f"stages: expected 1 to 3, found {stages}"):
        partition([1.0] * 5, stages, {1, 3})


@pytest.mark.parametrize("name", [name for name in group_options("model") if not name.endswith("_small")])
def test_no_published_model_has_a_slower_stage_than_with_equal_layers(name: str) -> None:
    config = architecture(name)
    pieces = config.model.depth - len(joined_layers(config))
    cuts = 0
    for schedule, degree, chunks in (("1f1b", 2, 1), ("1f1b", 8, 1), ("zero_bubble_v", 4, 2)):
        if degree * chunks > pieces:
            continue
        for context in CONTEXTS:
            ours = stage_layers(config, PipelinePlan(schedule, degree, chunks, 4 * degree), context)
            equal = equal_layers(config, degree * chunks)
            assert not {stage.start for stage in (*ours, *equal)} & joined_layers(config).keys()
            assert [len(stage) > 0 for stage in equal] == [True] * len(ours)
            assert max(totals(config, ours, context)) <= max(totals(config, equal, context)) * (1 + 1e-12)
            cuts += 1
    assert cuts


@pytest.mark.parametrize(
    "name", ["qwen3_next_80b_a3b", "deepseek_v3", "deepseek_v4_flash", "minimax_text_01"]
)
def test_costs_are_the_counted_operations(name: str) -> None:
    config = architecture(name)
    counts, width = count(config), config.model.width
    flops = counts.forward_flops(4096)
    around = sum(layer.norm_params for layer in counts.layers)
    around += sum(layer.norm_params - 2 * width**2 for layer in counts.mtp_modules)
    embedding = 4 * OPERATIONS_PER_BYTE * width
    forward = sum(cost.forward for cost in layer_costs(config, 4096))
    assert forward == pytest.approx(flops.total + flops.mtp + 2 * around + embedding, rel=1e-12)


def test_the_best_cut_depends_on_the_context() -> None:
    config, plan = architecture("minimax_text_01"), PipelinePlan("1f1b", 8, 1, 32)
    short, long = (stage_layers(config, plan, context) for context in CONTEXTS)
    for context, best, other in ((CONTEXTS[0], short, long), (CONTEXTS[1], long, short)):
        assert max(totals(config, best, context)) < 0.99 * max(totals(config, other, context))


def test_layers_that_share_stay_together() -> None:
    # Layers 1 to 3 read what 1 chose, 6 to 8 what 6 chose.
    assert set(joined_layers(SPARSE)) == {2, 3, 7, 8}
    assert "layer 3 shares the keys that layer 1 chose" in joined_layers(SPARSE)[3]
    shortcuts = small_architecture(["model.depth=4", "layout.ffn.pattern=shortcut dense"])
    assert set(joined_layers(shortcuts)) == {1, 3}


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.pp: 3 x 2 stages.*the 9 layers make 5 pieces.*use 5"):
        stage_layers(SPARSE, PipelinePlan("interleaved", 3, 2, 6), 4096)


@given(st.sets(st.sampled_from([1, 4, 5, 6]), max_size=4))
def test_a_line_reads_back_as_the_cut_that_wrote_it(edges: set[int]) -> None:
    stages = [range(*pair) for pair in pairwise((0, *sorted(edges), 9))]
    assert read_layout(SPARSE, len(stages), write_layout(SPARSE, stages)) == stages


def test_repeats_stand_before_or_behind_a_name() -> None:
    config = small_architecture(["model.depth=8", "layout.pattern=3*gdn attn"])
    expected = [range(4), range(4, 8)]
    for line in (
        "E 3*gdn attn | 3*gdn attn H",
        "E gdn*3 attn|gdn * 3 attn H",
        "E 2*(gdn) gdn attn | (3*gdn attn) H",
    ):
        assert read_layout(config, 2, line) == expected
    assert stage_layers(config, PipelinePlan("1f1b", 2, 1, 2), 4096, "E gdn | 2*gdn attn 3*gdn attn H") == [
        range(1),
        range(1, 8),
    ]


BAD = {
    "E gdn dsa 2*dsa_shared attn gdn dsa 2*dsa_shared H": ["1 stages; expected 2"],
    "gdn dsa 2*dsa_shared | attn gdn dsa 2*dsa_shared": ["stage 0: E stands once", "stage 1: H stands once"],
    "E gdn | dsa 2*dsa_shared attn E gdn dsa 2*dsa_shared H": ["stage 1: E stands once, first in stage 0"],
    "E gdn H | dsa 2*dsa_shared attn gdn dsa 2*dsa_shared H": ["stage 0: H stands once, last in stage 1"],
    "E gdn dsa | 2*dsa_shared attn gdn dsa 2*dsa_shared H": [
        "stage 1: begins with layer 2, but layer 2 shares"
    ],
    "E gdn dsa 2*dsa_shared attn gdn dsa 2*dsa_shared | H": ["stage 1: names no layer"],
    "E gdn | gda 2*dsa_shared attn gdn dsa 2*dsa_shared H": [
        "stage 1: 'gda' is not one of E, H,",
        "stage 1: layer 1 is named gda; expected dsa",
    ],
    "E gdn | dsa 3*dsa_shared attn gdn dsa 2*dsa_shared H": [
        "the stages name 10 layers; expected 9",
        "stage 1: layer 4 is named dsa_shared; expected attn",
    ],
    "E gdn | dsa 2*dsa_shared attn gdn dsa dsa_shared H": ["the stages name 8 layers; expected 9"],
    "E attn | attn 2*dsa_shared attn gdn dsa 2*dsa_shared H": [
        "stage 0: layer 0 is named attn; expected gdn",
        "stage 1: layer 1 is named attn; expected dsa",
    ],
    "E gdn | dsa 2*(dsa_shared attn gdn dsa 2*dsa_shared H": ["stage 1: a group in"],
    "E 0*gdn | dsa 2*dsa_shared attn gdn dsa 2*dsa_shared H": ["stage 0: 0* in"],
    "": ["1 stages; expected 2", "stage 0: names no layer", "stage 0: E stands once"],
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_refused_with_the_place(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_layout(SPARSE, 2, line)
    assert all(violation.key == "parallel.pp_layout" for violation in caught.value.violations)
    for message in BAD[line]:
        assert any(message in violation.message for violation in caught.value.violations), caught.value


def refusals(line: str) -> list[str]:
    try:
        found = read_layout(SPARSE, 2, line)
    except ConfigError as error:
        return [str(violation) for violation in error.violations]
    assert [layer for stage in found for layer in stage] == list(range(9))
    return []


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["E", "H", "|", "gdn", "dsa", "dsa_shared", "attn", "2*", "(", ")", "?"])))
def test_any_line_is_a_whole_cut_or_is_refused_by_stage(items: list[str]) -> None:
    whole = ["E", "gdn", "|", "dsa", "2*", "dsa_shared", "attn", "gdn", "dsa", "2*", "dsa_shared", "H"]
    assert not refusals(" ".join(whole))
    for boundary in (0, len(items) // 2):
        # Something put into a good line is rarely good, and never passes for another cut.
        line = " ".join([*whole[:boundary], *items, *whole[boundary:]])
        assert all(message.startswith("parallel.pp_layout: ") for message in refusals(line))
        assert all("stage" in message for message in refusals(line))
        assert bool(refusals(line)) == bool(items)


def test_every_schedule_has_a_cut() -> None:
    config = architecture("kimi_linear_48b_a3b")
    for name, kind in SCHEDULE_KINDS.items():
        plan = PipelinePlan(name, 4, kind.chunks[1] or 2, 8)
        assert len(stage_layers(config, plan, 4096)) == plan.stages
