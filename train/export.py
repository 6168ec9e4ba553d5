"""`python -m train.export run=DIR to=DIR`: the newest checkpoint of a run as a directory of the hub.

`model_type=weft` writes weights in our own form instead, to begin another run from (`train.start`).
"""

from typing import Literal

from pydantic import Field

from conf.compose import Config, parse_command
from conf.help import Page, run
from train.config.load import open_run


class ExportCommand(Config):
    """Arguments of the command."""

    run: str = Field(description="directory of the run")
    to: str = Field(description="directory to write, which must not exist")
    model_type: str | None = Field(
        default=None, description="the family to write as, or weft; null is the first that fits"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the written weights, but for those that stay float32"
    )
    shard_gb: float = Field(default=5.0, gt=0, description="most of a file of weights, 10^9 bytes")


PAGE = Page(
    __doc__ or "",
    (
        "python -m train.export run=runs/default to=hub",
        "python -m train.export run=runs/default to=hub dtype=bfloat16",
        "python -m train.export run=runs/warm to=warm model_type=weft",
    ),
    fields=ExportCommand,
)


def main(arguments: list[str]) -> None:
    """Writes the directory and says as what. Raises the errors of conf.errors."""
    command = parse_command(arguments, ExportCommand)
    config = open_run(command.run)
    # What is mistyped is answered without waiting for these.
    import torch

    from model.hf.pretrained import save_pretrained
    from train.eval.restored import load_model

    model, step, ids = load_model(command.run, config)
    written = save_pretrained(
        model,
        command.to,
        model_type=command.model_type,
        dtype=getattr(torch, command.dtype),
        shard_bytes=int(command.shard_gb * 1e9),
        tokenizer_digest=ids.tokenizer,
    )
    if ids.tokenizer is None:
        print(f"{ids.where}: carries no digest of its tokenizer, so {command.to} carries none")
    print(f"wrote step {step} of {command.run} to {command.to} as {written}")


if __name__ == "__main__":
    run(main, PAGE)
