"""`python -m train.evaluate run=DIR`: held-out loss and bits per byte of the newest checkpoint of a run."""

import sys

from pydantic import Field

from conf.compose import Config, parse_command
from conf.help import Page, run
from train.config.load import open_run


class EvaluateCommand(Config):
    """Arguments of the command."""

    run: str = Field(description="directory of the run")
    rows: int | None = Field(default=None, ge=1, description="held-out windows to read; null is all")


PAGE = Page(
    __doc__ or "",
    ("python -m train.evaluate run=runs/default", "python -m train.evaluate run=runs/default rows=64"),
    fields=EvaluateCommand,
)


def main(arguments: list[str]) -> None:
    """Prints the scores as a table. Raises the errors of conf.errors."""
    command = parse_command(arguments, EvaluateCommand)
    config = open_run(command.run)
    # What is mistyped is answered without waiting for these.
    import torch

    from parallel.mesh.world import World
    from parallel.micro_batches import WholeModel
    from train.checkpoint.foreign_ids import Ids
    from train.eval.heldout import evaluate
    from train.eval.restored import load_model
    from train.loop.run import open_data
    from train.track.report import print_table

    loader = open_data(config, 0)
    restored = load_model(command.run, config)
    if line := restored.compare(Ids(config.data.directory, loader.card.tokenizer.digest)):
        print(line, file=sys.stderr)
    rows = command.rows or loader.held_out_rows
    world = World.alone(torch.device("cpu"))
    held_out = evaluate(
        WholeModel(restored.model), loader, world, rows=rows, micro_batch=config.rank_rows(1)[1]
    )
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
