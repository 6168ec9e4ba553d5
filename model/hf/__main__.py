"""`python -m model.hf import HUB OURS`, `export OURS HUB`: checkpoints in and out, one shard in memory.

`import` writes weights in our own form, from which training starts (`train.start`) and which `export` reads;
both read either form. `model_type=` picks among families that hold the architecture, `dtype=` converts.
"""

from typing import Literal

from pydantic import Field

from conf.compose import Config, parse_command
from conf.errors import ConfigError, Violation
from conf.help import Page, run

USAGE = "python -m model.hf import HUB OURS | export OURS HUB [model_type=NAME] [dtype=bfloat16] [shard_gb=5]"


class Conversion(Config):
    """Arguments of the command."""

    model_type: str | None = Field(
        default=None,
        description="of export: the family to write as; null is the first that fits",
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = Field(
        default=None,
        description="of the written weights, but for those that stay float32; null keeps all as they are",
    )
    shard_gb: float = Field(default=5.0, gt=0, description="most of a file of weights, 10^9 bytes")


PAGE = Page(
    __doc__ or "",
    (
        "python -m model.hf import hub/Qwen3-Next ours",
        "python -m train train.start=ours",
        "python -m model.hf export ours hub/new dtype=bfloat16",
    ),
    {
        "import HUB OURS": "a checkpoint of the hub, in a directory, to weights in our own form",
        "export OURS HUB": "weights in our own form, or of the hub, to a checkpoint that transformers opens",
    },
    fields=Conversion,
)


def main(arguments: list[str]) -> None:
    """Converts and says what was written. Raises ConfigError, CheckpointError, StorageError."""
    words = [argument for argument in arguments if "=" not in argument]
    if len(words) != 3 or words[0] not in ("import", "export"):
        raise ConfigError([Violation(" ".join(words) or "model.hf", f"write {USAGE}")])
    action, source, target = words
    options = parse_command([argument for argument in arguments if "=" in argument], Conversion)
    import torch

    from model.hf.convert import convert
    from model.hf.own import OWN

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
    run(main, PAGE)
