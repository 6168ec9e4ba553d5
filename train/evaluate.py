"""`python -m train.evaluate run=DIR`: held-out loss and bits per byte of a checkpoint of a run.

On several processes (torchrun) in the layout of the run, or with keys of `parallel` that are typed.
"""

import sys

from pydantic import Field

from conf.compose import Config, parse_command
from conf.help import run
from train.config.help import layout_page
from train.config.reading import open_to_read, split_layout


class EvaluateCommand(Config):
    """Arguments of the command."""

    run: str = Field(description="directory of the run")
    step: int | None = Field(default=None, ge=0, description="of the checkpoint; null is the newest good one")
    rows: int | None = Field(default=None, ge=1, description="held-out windows to read; null is all")
    micro_batch: int | None = Field(
        default=None, ge=1, description="windows of a rank at a time; null is as many as in training"
    )


PAGE = layout_page(
    __doc__,
    (
        "python -m train.evaluate run=runs/default",
        "python -m train.evaluate run=runs/default step=1000 rows=64",
        "torchrun --nproc-per-node 8 -m train.evaluate run=runs/big parallel.ep=8",
    ),
    EvaluateCommand,
)


def main(arguments: list[str]) -> None:
    """Prints the scores as a table. Raises the errors of conf.errors."""
    from train.config.environment import read_environment, share_processors

    share_processors()
    own, layout = split_layout(arguments)
    command, environment = parse_command(own, EvaluateCommand), read_environment()
    config = open_to_read(command.run, command.step, layout, environment.world_size)
    # What is mistyped is answered without waiting for these.
    from train.checkpoint.foreign_ids import Ids
    from train.eval.heldout import evaluate
    from train.eval.restored import open_readers, restore
    from train.loop.kernel_check import prepare_kernels
    from train.loop.run import open_data
    from train.loop.same_ranks import compare_data
    from train.track.report import print_table

    with open_readers(config, environment, ("micro_batch=1",)) as world:
        loader = open_data(config, world.rank)
        compare_data(loader, world)
        micro_batch = command.micro_batch or max(1, config.rank_rows(world.axes.batch.size)[1])
        restored = restore(command.run, config, world, step=command.step, rows=micro_batch)
        line = restored.compare(Ids(config.data.directory, loader.card.tokenizer.digest))
        kernels = prepare_kernels(config, restored.built.modules(), world)
        if world.rank == 0:
            print(*filter(None, (line, kernels)), sep="\n", file=sys.stderr, flush=True)
        rows = command.rows or loader.held_out_rows
        runner, depth = restored.built.runner, config.model.mtp.depth
        held_out = evaluate(runner, loader, world, rows=rows, micro_batch=micro_batch, mtp_depth=depth)
    if environment.rank != 0:
        return
    print_table(
        "Held-out documents",
        {
            "run": command.run,
            "step": f"{restored.step:,}",
            "windows": f"{min(rows, loader.held_out_rows):,} of {loader.held_out_rows:,}",
            "targets": f"{held_out.targets:,}",
            "loss (nats per token)": f"{held_out.loss:.4f}",
            "bits per byte": f"{held_out.bits_per_byte:.4f}",
        },
    )


if __name__ == "__main__":
    run(main, PAGE)
