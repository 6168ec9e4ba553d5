"""`python -m train.rehearse [group=option] [key=value]`: any rank of a run, played by this process alone.

The model of the rank is built in its real size and layout from tensors that are shapes alone, and goes
through one step; peers do nothing. Bytes and collectives are those of what was built and called, not of
formulas.
"""

import json
import os
from collections.abc import Collection
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError, Violation
from conf.help import run
from conf.interrupts import end_at_interrupt, shielded
from train.config.help import run_page
from train.estimate.figures import print_figures, readable_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from train.config.run_config import RunConfig

PAGE = run_page(
    __doc__,
    (
        "python -m train.rehearse recipe=kimi_linear_48b_h100_8n",
        "python -m train.rehearse recipe=kimi_linear_48b_h100_8n rehearse.rank=17",
        "python -m train.rehearse model=qwen3_next_80b_a3b cluster=h100_8n rehearse.format=json",
    ),
)


def rehearse(config: "RunConfig", pool: Executor) -> dict[str, Any]:
    """All figures as one plain object; bytes and counts, nothing rounded.

    The processes of `pool` play the ranks.

    Raises ConfigError for a rank that the run does not have, for parallel.data=zero, and for DeepEP.
    """
    from train.estimate.rehearsal import coordinates_of, sampled_ranks, stepping_ranks

    size = config.cluster.nodes * config.cluster.gpus_per_node
    if config.rehearse.rank is not None and config.rehearse.rank >= size:
        message = f"found {config.rehearse.rank}; the run has ranks 0 to {size - 1}"
        raise ConfigError([Violation("rehearse.rank", message)])
    if config.parallel.data == "zero":
        message = "zero builds on real memory and cannot be rehearsed; set it to fsdp, or train.plan the run"
        raise ConfigError([Violation("parallel.data", message)])
    if config.parallel.ep_dispatch == "deepep":
        message = "deepep moves tokens by kernels that cannot be rehearsed; set it to all_to_all"
        raise ConfigError([Violation("parallel.ep_dispatch", message)])
    degrees = config.parallel.degrees(size)
    own = config.rehearse.rank
    ranks = sampled_ranks(degrees) if own is None else [own]
    stepping = stepping_ranks(config, size) if own is None else {own: own}
    found, played = side_by_side(config, size, set(stepping.values()), ranks, pool)
    steps = [found[like] | coordinates_of(config, rank, size) for rank, like in stepping.items()]
    totals = {rank["rank"]: sum(rank["bytes"]["total"][what] for what in WHAT) for rank in played}
    return {
        "world_size": size,
        "degrees": degrees.describe(),
        "ranks": played,
        "fullest": max(totals, key=lambda rank: totals[rank]),
        "emptiest": min(totals, key=lambda rank: totals[rank]),
        "steps": steps,
        "checkpoint": checkpoint(played),
    }


def side_by_side(
    config: "RunConfig", size: int, stepping: Collection[int], holding: Collection[int], pool: Executor
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """The steps of some ranks, and what others hold, played by the processes of `pool`."""
    from train.estimate.rehearsal import joined_step, play, step_parts, step_some, with_pp_layout

    config = with_pp_layout(config, size)
    # Both ends of a pipeline take longest, so they begin.
    order = sorted(stepping, key=lambda rank: rank not in (min(stepping), max(stepping)))
    steps = {
        rank: [
            (part.weight, pool.submit(step_some, config, rank, size, part.layers, part.micro_batches))
            for part in step_parts(config, rank, size)
        ]
        for rank in order
    }
    holds = [pool.submit(play, config, rank, size) for rank in holding]
    played = [hold.result() for hold in holds]
    found = {
        rank: joined_step(config, rank, size, [(weight, job.result()) for weight, job in jobs])
        for rank, jobs in steps.items()
    }
    return found, played


def with_processes(config: "RunConfig") -> dict[str, Any]:
    """What `rehearse` finds with a process per core. The process must not have used a fork server before."""
    # To import torch takes as long as to play one: it is done once, in a process of its own, since a process
    # whose torch has started threads cannot be forked.
    context = get_context("forkserver")
    context.set_forkserver_preload(["train.estimate.rehearsal"])
    with shielded():
        ensure_running()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, end_at_interrupt) as pool:
        try:
            return rehearse(config, pool)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


WHAT = ("parameters", "gradients", "optimizer")


def checkpoint(played: list[dict[str, Any]]) -> dict[str, Any]:
    """What the save plans of the ranks say together."""
    found = [line for rank in played for line in rank["checkpoint"]["problems"]]
    return {
        "parameters": played[0]["checkpoint"]["parameters"],
        "bytes": played[0]["checkpoint"]["whole_bytes"],
        "problems": list(dict.fromkeys(found)),
    }


def show(figures: dict[str, Any], config: "RunConfig") -> None:
    """Prints the figures as tables."""
    from rich.console import Console
    from rich.table import Table

    from parallel.pipeline.partition import stage_layers, write_layout

    console = Console()
    table = Table(title=f"What {len(figures['ranks'])} of {figures['world_size']} ranks hold")
    for name in ("ranks", "kind", *WHAT):
        table.add_column(name, justify="right" if name in WHAT else "left")
    for ranks in alike(figures["ranks"]):
        for kind, row in ranks[0]["bytes"].items():
            names = ", ".join(str(rank["rank"]) for rank in ranks) if kind == "dense" else ""
            cells = (readable_bytes(row[what]) for what in WHAT)
            table.add_row(names, kind, *cells, end_section=kind == "total")
    console.print(table)
    if config.parallel.pp > 1:
        plan = config.parallel.plan(figures["steps"][0]["micro_batches"])
        assert plan is not None, f"{config.parallel.pp=}"
        cut = stage_layers(config.architecture, plan, config.data.sequence_length, config.parallel.pp_layout)
        line = write_layout(config.architecture, cut)
        console.print(f"{plan.schedule}, {plan.degree} ranks with {plan.chunks} stages each: {line}")
    for step in figures["steps"]:
        show_step(console, step)
    summary = Table(title="Rehearsal", show_header=False)
    for name, value in summary_rows(figures, config):
        summary.add_row(name, value)
    console.print(summary)


def show_step(console: "Console", step: dict[str, Any]) -> None:
    """Prints the collectives of a step as a table."""
    from rich.table import Table

    count = step["micro_batches"]
    title = f"Collectives of a step of rank {step['rank']}, {count} micro-batch{'es' if count > 1 else ''}"
    table = Table(title=title)
    for name in ("phase", "axis", "ranks", "collective", "calls", "bytes", "sent"):
        table.add_column(name, justify="left" if name in ("phase", "axis", "collective") else "right")
    for row in step["collectives"]:
        table.add_row(
            row["phase"],
            row["axis"],
            f"{row['ranks']:,}",
            row["kind"],
            f"{row['calls']:,}",
            readable_bytes(row["bytes"]),
            readable_bytes(row["sent"]),
        )
    console.print(table)
    if step["is_routed_evenly"]:
        console.print("Tokens choose experts evenly here; with real choices the bytes along ep vary.")


def alike(ranks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The ranks in groups that hold as many bytes of everything."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for rank in ranks:
        groups.setdefault(json.dumps(rank["bytes"]), []).append(rank)
    return list(groups.values())


def summary_rows(figures: dict[str, Any], config: "RunConfig") -> list[tuple[str, str]]:
    """Names and readable values below the tables."""
    saved = figures["checkpoint"]
    rows = [
        ("ranks", figures["degrees"]),
        ("fullest, emptiest rank", f"{figures['fullest']}, {figures['emptiest']}"),
        ("checkpoint", f"{saved['parameters']:,} parameters, {readable_bytes(saved['bytes'])} with moments"),
    ]
    rows += [("checkpoint, WRONG", line) for line in saved["problems"][:10]]
    if not saved["problems"]:
        rows.append(("save plans", "blocks of all ranks cover every parameter, none overlap"))
    if config.cluster.memory_gib is not None:
        most = max(sum(rank["bytes"]["total"][what] for what in WHAT) for rank in figures["ranks"])
        share = most / (config.cluster.memory_gib * 2**30)
        rows.append((f"state, share of {config.cluster.memory_gib:g} GiB", f"{share:.0%}"))
    return rows


def main(arguments: list[str]) -> None:
    """Prints the rehearsal of the config. Raises ConfigError."""
    print_figures(arguments, with_processes, show, "rehearse")


if __name__ == "__main__":
    run(main, PAGE)
