"""`python -m train.export run=DIR to=DIR`: a checkpoint of a run as a directory of the hub.

`model_type=weft` writes weights in our own form instead, to begin another run from (`train.start`). Memory
holds one file of weights at a time. On several processes (torchrun) each writes files of its own.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from conf.compose import Config, parse_command
from conf.errors import CheckpointError
from conf.help import Page, run
from train.config.reading import open_to_read


class ExportCommand(Config):
    """Arguments of the command."""

    run: str = Field(description="directory of the run")
    step: int | None = Field(default=None, ge=0, description="of the checkpoint; null is the newest good one")
    to: str = Field(description="directory to write, which must not exist")
    model_type: str | None = Field(
        default=None, description="the family to write as, or weft; null is the first that fits"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the written weights, but for those that stay float32"
    )
    shard_gb: float = Field(default=5.0, gt=0, description="most of a file of weights, 10^9 bytes")


# No process has a part of the model.
WHOLE = [f"parallel.{name}=1" for name in ("pp", "dp_replicate", "cp", "tp", "ep")] + ["parallel.dp_shard=-1"]
PAGE = Page(
    __doc__ or "",
    (
        "python -m train.export run=runs/default to=hub",
        "python -m train.export run=runs/default step=1000 to=hub dtype=bfloat16",
        "python -m train.export run=runs/warm to=warm model_type=weft",
        "torchrun --nproc-per-node 8 -m train.export run=runs/big to=hub shard_gb=2",
    ),
    fields=ExportCommand,
)


def main(arguments: list[str]) -> None:
    """Writes the directory and says as what. Raises the errors of conf.errors."""
    from train.config.environment import read_environment, share_processors

    share_processors()
    command, environment = parse_command(arguments, ExportCommand), read_environment()
    if Path(command.to).exists():
        raise CheckpointError(f"{command.to}: exists; export to a directory that does not")
    config = open_to_read(command.run, command.step, WHOLE, environment.world_size)
    # What is mistyped is answered without waiting for these.
    import torch

    from train.eval.exported import Form, export
    from train.eval.restored import open_readers

    form = Form(command.model_type, getattr(torch, command.dtype), int(command.shard_gb * 1e9))
    with open_readers(config, environment, ("a smaller shard_gb",)) as world:
        written, step, ids, has_tokenizer = export(
            command.run, config, Path(command.to), form, world, command.step
        )
    if environment.rank != 0:
        return
    if ids.tokenizer is None:
        print(f"{ids.where}: carries no digest of its tokenizer, so {command.to} carries none")
    elif not has_tokenizer:
        without = f"neither {command.run} nor {config.data.directory} has"
        print(f"{command.to}: without a tokenizer: {without} the one with sha256 {ids.tokenizer}")
    print(f"wrote step {step} of {command.run} to {command.to} as {written}")


if __name__ == "__main__":
    run(main, PAGE)
