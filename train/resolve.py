"""`python -m train.resolve [group=option] [key=value]`: the config of a run as JSON, references followed.

What a script wants to know of a run it takes from here. With --check the run is checked as for its cluster
first, its memory included.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from conf.errors import ConfigError, Violation
from conf.help import run, show
from train.config.help import run_page

CHECK = "--check"
PAGE = run_page(
    __doc__,
    (
        "python -m train.resolve recipe=smoke run.dir='runs/x_${model.depth}'",
        "python -m train.resolve recipe=kimi_linear_48b_h100_8n --check",
    ),
    {
        CHECK: "refuse what cannot start on the processes of its cluster or needs more memory than they "
        "have, and a run.dir that holds another run"
    },
)


def main(arguments: Sequence[str]) -> None:
    """Prints the config on one line.

    Raises ConfigError with everything that is wrong: without --check of types and ranges alone, for which
    torch is not imported.
    """
    overrides = [argument for argument in arguments if argument != CHECK]
    flags = [argument for argument in overrides if argument.startswith("-")]
    if flags:
        message = f"one run has one config; the only flag here is {CHECK}"
        raise ConfigError([Violation(flag, message) for flag in flags])
    show(json.dumps(checked_tree(overrides) if CHECK in arguments else composed_tree(overrides)) + "\n")


def composed_tree(overrides: Sequence[str]) -> dict:
    """The composed config, types and ranges checked. Raises ConfigError."""
    from conf.compose import validate
    from train.config.fields import RunDraft
    from train.config.load import compose_run, read_run, with_global_batch

    given = read_run(overrides)
    with given.naming_file():
        tree = compose_run(given)
        # A batch that is not given depends on the processes, which only --check takes from the cluster.
        validate(RunDraft, with_global_batch(tree, None))
    return tree


def checked_tree(overrides: Sequence[str]) -> dict:
    """The config with every default, on the processes of its cluster.

    Raises ConfigError, also where the directory holds a run of another config.
    """
    from train.config.load import load_config

    config = load_config(overrides, None, starts=True)
    from train.config.saved import saved_differences
    from train.estimate.memory import memory_violations

    tree = config.model_dump(mode="json")
    found = [*memory_violations(config), *saved_differences(Path(config.run.dir), tree)]
    if found:
        raise ConfigError(found)
    return tree


if __name__ == "__main__":
    run(main, PAGE)
