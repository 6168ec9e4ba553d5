"""`python -m train.plan [group=option] [key=value]`: what a run costs, before anything is started.

Parameters and FLOPs are counted from the config alone; no model is built and no data is needed.
"""

from typing import TYPE_CHECKING, Any

from conf.help import run
from model.layout import NONE
from train.config.help import run_page
from train.estimate.figures import print_figures, readable_bytes

if TYPE_CHECKING:
    from model.count import ModelCount
    from train.config.run_config import RunConfig

PAGE = run_page(
    __doc__,
    (
        "python -m train.plan model=qwen3_next_80b_a3b",
        "python -m train.plan recipe=kimi_linear_48b_h100_8n plan.context=131072",
        "python -m train.plan model=mixtral_8x7b cluster=h100_8n plan.format=json",
    ),
)
CONTEXTS = (4096, 32768, 131072)


def plan(config: "RunConfig") -> dict[str, Any]:
    """All figures of the plan as one plain object; bytes, counts and operations, nothing rounded.

    flops_per_token are useful operations of a training step, three times forward, at `context`.
    """
    from model.count import count
    from train.estimate.memory import memory_per_rank

    counts = count(config.architecture)
    context = config.plan.context or config.data.sequence_length
    world_size = config.cluster.nodes * config.cluster.gpus_per_node
    memory = memory_per_rank(config, world_size)
    return {
        "context": context,
        "parameters": parameters(counts),
        "flops_per_token": counts.training_flops(context),
        "forward_flops_per_token": forward_flops(counts, context),
        "training_flops_per_token_by_context": {str(n): counts.training_flops(n) for n in CONTEXTS},
        "cache_bytes": counts.cache_bytes(context),
        "world_size": world_size,
        "memory_bytes_per_rank": memory._asdict() | {"total": memory.total},
        "layers": [layer_row(counts, index, context) for index in range(len(counts.layers))],
    }


def parameters(counts: "ModelCount") -> dict[str, int]:
    """Parameter counts by what they are for; `total` and `active` leave out MTP modules.

    So published systems are counted, which name these modules beside the total.
    """
    layers = counts.layers
    return {
        "total": counts.main,
        "active": counts.active,
        "embedding": counts.embedding,
        "head": counts.head,
        "mixers": sum(layer.mixer_params for layer in layers),
        "routed_experts": sum(layer.routed for layer in layers),
        "other_feed_forward": sum(layer.ffn_params for layer in layers),
        "norms": sum(layer.norm_params for layer in layers) + counts.norm,
        "mtp": sum(layer.params for layer in counts.mtp_modules),
    }


def forward_flops(counts: "ModelCount", context: int) -> dict[str, float]:
    """Forward operations per token: by mixer its projections and its core, feed-forward, head."""
    flops = counts.forward_flops(context)
    by_mixer = {
        f"{name}_{part}": value
        for name, pair in flops.mixers.items()
        for part, value in pair._asdict().items()
    }
    return by_mixer | {"feed_forward": flops.ffn, "head": flops.head, "mtp": flops.mtp}


def layer_row(counts: "ModelCount", index: int, context: int) -> dict[str, Any]:
    """One layer of the per-layer table."""
    layer, config = counts.layers[index], counts.config
    mixing, cache = 0.0, 0
    if layer.mixer != NONE:
        mixing = sum(config.mixer[layer.mixer].flops(config.model.width, context))
        cache = config.mixer[layer.mixer].cache_bytes(context)
    return {
        "layer": index,
        "mixer": layer.mixer,
        "ffn": layer.ffn,
        "parameters": layer.params,
        "active_parameters": layer.active_params,
        "forward_flops_per_token": mixing + 2 * (layer.ffn_params + layer.active),
        "cache_bytes": cache,
    }


def show(figures: dict[str, Any], config: "RunConfig") -> None:
    """Prints the plan as tables, equal neighbouring layers folded into one row."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Layers")
    for name in ("layers", "mixer", "ffn", "parameters", "active", "forward MFLOP/token", "cache"):
        table.add_column(name, justify="left" if name in ("mixer", "ffn") else "right")
    for first, last, row in folded(figures["layers"]):
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            row["mixer"],
            row["ffn"],
            f"{row['parameters'] / 1e6:,.2f} M",
            f"{row['active_parameters'] / 1e6:,.2f} M",
            f"{row['forward_flops_per_token'] / 1e6:,.2f}",
            readable_bytes(row["cache_bytes"]),
        )
    console.print(table)
    summary = Table(title="Plan", show_header=False)
    for name, value in summary_rows(figures, config):
        summary.add_row(name, value)
    console.print(summary)


def folded(rows: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """First and last layer of each run of layers that are alike."""
    out: list[tuple[int, int, dict[str, Any]]] = []
    for row in rows:
        alike = {name: value for name, value in row.items() if name != "layer"}
        if out and {name: value for name, value in out[-1][2].items() if name != "layer"} == alike:
            out[-1] = (out[-1][0], row["layer"], out[-1][2])
        else:
            out.append((row["layer"], row["layer"], row))
    return out


def summary_rows(figures: dict[str, Any], config: "RunConfig") -> list[tuple[str, str]]:
    """Names and readable values below the layer table."""
    counts, memory = figures["parameters"], figures["memory_bytes_per_rank"]
    rows = [
        (f"parameters, {name.replace('_', ' ')}", f"{value / 1e6:,.2f} M") for name, value in counts.items()
    ]
    rows.append(
        (f"training FLOPs per token at {figures['context']:,}", f"{figures['flops_per_token'] / 1e9:,.4g} G")
    )
    for context, flops in figures["training_flops_per_token_by_context"].items():
        rows.append((f"  at {int(context):,}", f"{flops / 1e9:,.4g} G"))
    for name, flops in figures["forward_flops_per_token"].items():
        rows.append((f"  forward, {name.replace('_', ' ')}", f"{flops / 1e9:,.4g} G"))
    rows.append((f"cache of one sequence of {figures['context']:,}", readable_bytes(figures["cache_bytes"])))
    from train.config.show import batch_line

    rows.append(("ranks", config.parallel.describe(figures["world_size"])))
    rows.append(("batch", batch_line(config, figures["world_size"])))
    rows += [(f"memory per rank, {name}", readable_bytes(value)) for name, value in memory.items()]
    from train.estimate.memory import FITTING_SHARE, share_of_device

    share = share_of_device(config, memory["total"])
    if share is not None:
        verdict = "" if share <= FITTING_SHARE else ": does not fit"
        rows.append((f"share of {config.cluster.memory_gib:g} GiB", f"{share:.0%}{verdict}"))
    return rows


def main(arguments: list[str]) -> None:
    """Prints the plan of the config. Raises ConfigError."""
    print_figures(arguments, plan, show, "plan")


if __name__ == "__main__":
    run(main, PAGE)
