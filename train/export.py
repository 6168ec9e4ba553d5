"""`python -m train.export run=DIR to=DIR`: the newest checkpoint of a run as a directory of the hub.

`model_type=weft` writes weights in our own form instead, to begin another run from (`train.start`).
"""

import sys
from typing import Literal

from pydantic import Field

from conf.compose import Config, parse_command
from conf.errors import exit_on_error


class ExportCommand(Config):
    """Arguments of the command. model_type: a family that holds the architecture; None takes the first."""

    run: str
    to: str
    model_type: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    shard_gb: float = Field(default=5.0, gt=0)


def main(arguments: list[str]) -> None:
    """Writes the directory and says as what. Raises the errors of conf.errors."""
    import torch

    from model.hf.pretrained import save_pretrained
    from train.eval.restored import load_model, open_run

    command = parse_command(arguments, ExportCommand)
    model, step = load_model(command.run, open_run(command.run))
    model.to(getattr(torch, command.dtype))
    shard_bytes = int(command.shard_gb * 1e9)
    written = save_pretrained(model, command.to, model_type=command.model_type, shard_bytes=shard_bytes)
    print(f"wrote step {step} of {command.run} to {command.to} as {written}")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
