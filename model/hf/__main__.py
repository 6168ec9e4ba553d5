"""`python -m model.hf import HUB OURS`, `export OURS HUB`: checkpoints in and out, one shard in memory.

`import` writes weights in our own form, from which training starts (`train.start`) and which `export` reads;
both read either form. `model_type=` picks among families that hold the architecture, `dtype=` converts.
"""

import sys
from typing import Literal

import torch
from pydantic import Field

from conf.compose import Config, parse_command
from conf.errors import ConfigError, Violation, exit_on_error
from model.hf.convert import convert
from model.hf.own import OWN

USAGE = "python -m model.hf import HUB OURS | export OURS HUB [model_type=NAME] [dtype=bfloat16] [shard_gb=5]"


class Conversion(Config):
    """Arguments of the command."""

    model_type: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    shard_gb: float = Field(default=5.0, gt=0)


def main(arguments: list[str]) -> None:
    """Converts and says what was written. Raises ConfigError, CheckpointError, StorageError."""
    words = [argument for argument in arguments if "=" not in argument]
    if len(words) != 3 or words[0] not in ("import", "export"):
        raise ConfigError([Violation(" ".join(words) or "model.hf", f"write {USAGE}")])
    action, source, target = words
    options = parse_command([argument for argument in arguments if "=" in argument], Conversion)
    model_type = OWN.model_type if action == "import" else options.model_type
    if action == "import" and options.model_type is not None:
        raise ConfigError([Violation("model_type", "is read from the directory on import; leave it out")])
    written = convert(
        source,
        target,
        model_type=model_type,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        shard_bytes=int(options.shard_gb * 1e9),
    )
    print(f"wrote {target} as {written}")
    if action == "import":
        print(f"train from it: python -m train train.start={target}")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
