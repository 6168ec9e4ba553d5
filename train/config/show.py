"""What a run decided, as short tables before the first step."""

from itertools import groupby

from conf.kinds import kind_of
from model.count import count
from train.config.run_config import RunConfig
from train.track.report import print_table


def show_config(config: RunConfig, world_size: int) -> None:
    """Prints sizes, layout, data, optimizer and parallelism of the run."""
    counts = count(config.architecture)
    optim, train = config.optim, config.train
    kinds = kind_of(optim), kind_of(config.schedule)
    cautions = config.schedule.cautions(train.steps)
    print_table(
        "Run",
        {
            "run.dir": config.run.dir,
            "parameters": f"{counts.total / 1e6:,.1f} M, {counts.active / 1e6:,.1f} M active",
            "layers": layer_line(config),
            "data": f"{config.data.directory}, {config.data.sequence_length} tokens per sequence",
            "batch": batch_line(config, world_size),
            "steps": f"{train.steps:,} ({tokens_of(config):,} tokens)",
            "optimizer": f"{kinds[0]}, lr {optim.lr:g}, {kinds[1]}, clip {optim.clip_norm:g}",
            "precision": f"{config.precision.compute}, weights {config.precision.parameters}",
            "ranks": config.parallel.describe(world_size),
            **({"caution": "\n".join(cautions)} if cautions else {}),
        },
    )


def batch_line(config: RunConfig, world_size: int) -> str:
    """How many sequences a step has, and how they go through the model, also where no key says so."""
    rows, micro = config.rank_rows(config.parallel.degrees(world_size).batch)
    through = f", {rows // micro} micro-batches" if config.parallel.pp > 1 else ""
    return f"{config.train.global_batch} sequences, {micro} at a time on each rank{through}"


def tokens_of(config: RunConfig) -> int:
    """Tokens that all steps read."""
    return config.train.steps * config.train.global_batch * config.data.sequence_length


def layer_line(config: RunConfig) -> str:
    """The layers in order, equal neighbours folded: "3x gdn+moe, attn+moe"."""
    names = [f"{layer.mixer}+{layer.ffn}" for layer in config.architecture.layers]
    runs = [(name, len(list(same))) for name, same in groupby(names)]
    periods = [n for n in range(1, len(runs) + 1) if runs == runs[:n] * (len(runs) // n)]
    shown, times = runs[: periods[0]], len(runs) // periods[0]
    line = ", ".join(f"{length} {name}" if length > 1 else name for name, length in shown)
    return f"{times} x ({line})" if times > 1 else line
