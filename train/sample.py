"""`python -m train.sample run=DIR prompt="def "`: text from the newest checkpoint of a run."""

import sys
from pathlib import Path

from pydantic import Field

from conf.compose import Config, parse_command
from conf.help import Page, run
from train.config.load import open_run


class SampleCommand(Config):
    """Arguments of the command."""

    run: str = Field(description="directory of the run")
    prompt: str = Field(default="def ", description="text that is continued")
    tokens: int = Field(default=200, ge=1, description="tokens to add to it")
    temperature: float = Field(default=0.7, ge=0, description="of the softmax; 0 takes the likeliest token")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="of the random choices; the same one gives the same text"
    )


PAGE = Page(
    __doc__ or "",
    (
        'python -m train.sample run=runs/default prompt="def "',
        "python -m train.sample run=runs/default tokens=500 temperature=0 seed=1",
    ),
    fields=SampleCommand,
)


def main(arguments: list[str]) -> None:
    """Prints the prompt and its continuation. Raises the errors of conf.errors."""
    command = parse_command(arguments, SampleCommand)
    config = open_run(command.run)
    # What is mistyped is answered without waiting for these.
    import torch

    from data.card import TOKENIZER
    from data.tokenizer import load_tokenizer
    from parallel.mesh.world import World
    from train.checkpoint.foreign_ids import Ids
    from train.config.fields import SampleConfig
    from train.eval.restored import load_model
    from train.loop.report import sample_text

    path = Path(config.data.directory) / TOKENIZER
    tokenizer = load_tokenizer(path)
    restored = load_model(command.run, config)
    if line := restored.compare(Ids(str(path), tokenizer.digest)):
        print(line, file=sys.stderr)
    print(f"step {restored.step} of {command.run}", file=sys.stderr)
    sample = SampleConfig(
        prompt=command.prompt, tokens=command.tokens, temperature=command.temperature, every=None
    )
    train = config.train.model_copy(update={"seed": command.seed})
    world = World.alone(torch.device("cpu"))
    config = config.model_copy(update={"sample": sample, "train": train})
    print(sample_text(restored.model, tokenizer, config, world))


if __name__ == "__main__":
    run(main, PAGE)
