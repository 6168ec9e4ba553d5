"""Pipelines of published models, simulated: our cut by cost beside one of equal layers.

`python -m bench.pipeline [degree=8] [micro_batches=32] [only=NAME,..]` prints a table for each schedule at 4K
and 128K tokens: the slowest stage and the slowest rank over the mean, the share of time in which ranks wait,
and how much longer a step takes with equal layers. It writes bench/results/pipeline.json and a plot of one
model's timelines. `python -m bench.pipeline write` puts what the first says into docs/parallelism.md. Costs
are counted operations, so that no machine is needed; nothing is measured here.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bench import tables
from conf.compose import compose
from conf.help import Page, run
from model.config import Architecture
from parallel.config.pipeline import SCHEDULE_KINDS, PipelinePlan
from parallel.pipeline.cost import stage_costs
from parallel.pipeline.partition import equal_layers, joined_layers, stage_layers, write_layout
from parallel.pipeline.timeline import Timeline, simulate

MODELS = (
    "qwen3_next_80b_a3b",
    "qwen3_5_397b_a17b",
    "kimi_linear_48b_a3b",
    "minimax_text_01",
    "deepseek_v3_2",
    "deepseek_v4_flash",
    "glm_5",
    "nsa_27b_a3b",
)
CONTEXTS = (4096, 131072)
SHOWN = ("qwen3_next_80b_a3b", 131072)
RESULTS = Path("bench/results")


class Row(NamedTuple):
    """One model, context and schedule; pairs are our cut and equal layers.

    The balances are the slowest stage, or rank, over the mean one. slower is the step with equal layers over
    ours.
    """

    model: str
    context: int
    plan: PipelinePlan
    stage_balance: tuple[float, float]
    rank_balance: tuple[float, float]
    bubble: tuple[float, float]
    slower: float
    layout: str


def main(arguments: list[str]) -> None:
    """Prints and writes the table, draws the plot; or writes docs/parallelism.md."""
    if arguments == ["write"]:
        tables.show(table(), "pipeline", arguments)
        return
    given = dict(argument.split("=", 1) for argument in arguments)
    degree, micro_batches = int(given.get("degree", "8")), int(given.get("micro_batches", "32"))
    names = given["only"].split(",") if "only" in given else MODELS
    plans = [
        PipelinePlan(name, degree, kind.chunks[1] or 2, micro_batches)
        for name, kind in SCHEDULE_KINDS.items()
    ]
    rows, shown = [], {}
    for name in names:
        config = compose([f"model={name}"], Architecture)
        for context in CONTEXTS:
            for plan in plans:
                if plan.stages > config.model.depth - len(joined_layers(config)):
                    print(f"{name} has too few layers for {plan.stages} stages: {plan.schedule} left out")
                    continue
                row, timeline = measure(name, config, context, plan)
                rows.append(row)
                if (name, context) == SHOWN:
                    shown[plan.schedule] = timeline
    show(rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    plain = [row._asdict() | {"plan": row.plan._asdict()} for row in rows]
    (RESULTS / "pipeline.json").write_text(json.dumps(plain, indent=1) + "\n")
    if shown:
        draw(shown, RESULTS / "pipeline.png")


def measure(name: str, config: Architecture, context: int, plan: PipelinePlan) -> tuple[Row, Timeline]:
    """Both cuts simulated, and the timeline of ours."""
    cuts = (
        stage_layers(config, plan, context),
        equal_layers(config, plan.stages),
    )
    costs = [stage_costs(config, cut, context) for cut in cuts]
    totals = [[cost.total for cost in each] for each in costs]
    loads = [
        [sum(each[stage] for stage in plan.stages_of(rank)) for rank in range(plan.degree)] for each in totals
    ]
    ours, equal = (simulate(plan, each) for each in costs)
    row = Row(
        name,
        context,
        plan,
        (unevenness(totals[0]), unevenness(totals[1])),
        (unevenness(loads[0]), unevenness(loads[1])),
        (ours.bubble, equal.bubble),
        equal.span / ours.span,
        write_layout(config, cuts[0]),
    )
    return row, ours


def unevenness(loads: list[float]) -> float:
    """The largest over the mean."""
    return max(loads) * len(loads) / sum(loads)


def show(rows: list[Row]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Simulated pipelines: cut by cost | equal layers")
    for column in ("model", "context", "schedule", "stage", "rank", "bubble", "equal / ours"):
        table.add_column(column, justify="left" if column in ("model", "schedule") else "right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.context:,}",
            f"{row.plan.schedule} {row.plan.degree} x {row.plan.chunks}",
            " | ".join(f"{value:.2f}" for value in row.stage_balance),
            " | ".join(f"{value:.2f}" for value in row.rank_balance),
            " | ".join(f"{value:.1%}" for value in row.bubble),
            f"{row.slower:.3f}",
        )
    Console(width=120).print(table)


def table() -> str:
    """Of the result file: two of its schedules, one line for each model, and all in a sentence."""
    rows = json.loads((RESULTS / "pipeline.json").read_text())
    columns = [(schedule, context) for schedule in ("1f1b", "zero_bubble_v") for context in CONTEXTS]
    heads = [f"{schedule}, {context // 1024}K" for schedule, context in columns]
    lines = [f"| model | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    found = {(row["model"], row["plan"]["schedule"], row["context"]): row for row in rows}
    for model in dict.fromkeys(row["model"] for row in rows):
        lines.append(f"| {model} | {' | '.join(cell(found.get((model, *column))) for column in columns)} |")
    slower = [row["slower"] for row in rows]
    longer = sum(factor < 1 for factor in slower)
    lines += [
        "",
        f"Over all schedules equal layers take {min(slower):.3f} to {max(slower):.3f} times as long; "
        f"in {longer} of {len(slower)} cases our cut is the longer one.",
    ]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any] | None) -> str:
    """The share of waiting of our cut and of equal layers, and the factor between the steps."""
    if row is None:
        return "too few layers"
    ours, equal = row["bubble"]
    return f"{ours:.0%} / {equal:.0%}, {row['slower']:.2f} x"


def draw(timelines: dict[str, Timeline], path: Path) -> None:
    """Writes a plot with one panel for each schedule and one line for each rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colours = {"forward": "#4c78a8", "backward": "#e45756", "input": "#f58518", "weight": "#54a24b"}
    figure, axes = pyplot.subplots(len(timelines), 1, sharex=True, figsize=(14, 2 * len(timelines)))
    end = max(timeline.span for timeline in timelines.values())
    for axis, (name, timeline) in zip(axes, timelines.items(), strict=True):
        for rank, busy in enumerate(timeline.ranks):
            spans = [(part.start / end, (part.end - part.start) / end) for part in busy]
            axis.broken_barh(
                spans,
                (rank - 0.4, 0.8),
                facecolors=[colours[part.action.kind] for part in busy],
                edgecolors="white",
                linewidth=0.2,
            )
        axis.invert_yaxis()
        axis.set_ylabel("rank")
        axis.set_title(f"{name}: ranks wait {timeline.bubble:.1%} of the step", loc="left", fontsize=9)
    axes[-1].set_xlabel("time, share of the slowest step")
    legend = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=legend, loc="upper right", ncols=len(legend), fontsize=8)
    figure.suptitle(f"{SHOWN[0]} at {SHOWN[1]:,} tokens, simulated", x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(
        main,
        Page(
            __doc__ or "",
            ("python -m bench.pipeline degree=8 micro_batches=32", "python -m bench.pipeline write"),
        ),
    )
