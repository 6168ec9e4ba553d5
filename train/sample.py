"""`python -m train.sample run=DIR prompt="def "`: text from a checkpoint of a run.

On several processes (torchrun) in the layout of the run, or with keys of `parallel` that are typed.
"""

import sys
from pathlib import Path

from pydantic import Field

from conf.compose import Config, parse_command
from conf.help import run
from train.config.help import layout_page
from train.config.reading import open_to_read, split_layout


class SampleCommand(Config):
    """Arguments of the command."""

    run: str = Field(description="directory of the run")
    step: int | None = Field(default=None, ge=0, description="of the checkpoint; null is the newest good one")
    prompt: str = Field(default="def ", description="text that is continued")
    tokens: int = Field(default=200, ge=1, description="tokens to add to it")
    temperature: float = Field(default=0.7, ge=0, description="of the softmax; 0 takes the likeliest token")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="of the random choices; the same one gives the same text"
    )


PAGE = layout_page(
    __doc__,
    (
        'python -m train.sample run=runs/default prompt="def "',
        "python -m train.sample run=runs/default step=1000 tokens=500 temperature=0 seed=1",
        "torchrun --nproc-per-node 8 -m train.sample run=runs/big parallel.ep=8",
    ),
    SampleCommand,
)


def main(arguments: list[str]) -> None:
    """Prints the prompt and its continuation. Raises the errors of conf.errors."""
    from train.config.environment import read_environment, share_processors

    share_processors()
    own, layout = split_layout(arguments)
    command, environment = parse_command(own, SampleCommand), read_environment()
    config = open_to_read(command.run, command.step, layout, environment.world_size)
    # What is mistyped is answered without waiting for these.
    from data.card import read_card
    from train.checkpoint.foreign_ids import Ids
    from train.config.fields import SampleConfig
    from train.eval.restored import open_readers, restore
    from train.loop.kernel_check import prepare_kernels
    from train.loop.report import sample_text

    directory = Path(config.data.directory).expanduser()
    tokenizer = read_card(directory).tokenizer.load(directory)
    sample = SampleConfig(
        prompt=command.prompt, tokens=command.tokens, temperature=command.temperature, every=None
    )
    train = config.train.model_copy(update={"seed": command.seed})
    with open_readers(config, environment) as world:
        restored = restore(command.run, config, world, step=command.step)
        line = restored.compare(Ids(str(directory), tokenizer.digest))
        kernels = prepare_kernels(config, restored.built.modules(), world)
        if world.rank == 0:
            lines = (line, kernels, f"step {restored.step} of {command.run}")
            print(*filter(None, lines), sep="\n", file=sys.stderr, flush=True)
        config = config.model_copy(update={"sample": sample, "train": train})
        text = sample_text(restored.built.runner, tokenizer, config, world)
    if environment.rank == 0:
        print(text)


if __name__ == "__main__":
    run(main, PAGE)
