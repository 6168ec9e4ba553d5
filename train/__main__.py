"""`python -m train [group=option] [key=value]`: one run; with -m or another Hydra flag, Hydra's own ways."""

import sys

from conf.errors import exit_on_error


def main() -> None:
    """Checks the config before anything slow, then trains."""
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        from train.sweep import hydra_main

        hydra_main(arguments)
        return
    with exit_on_error():
        start(arguments)


def start(arguments: list[str]) -> None:
    """One run from its overrides. Raises the errors of conf.errors."""
    from train.config.environment import read_environment
    from train.config.load import load_config

    environment = read_environment()
    config = load_config(arguments, environment.world_size)
    from train.loop.run import run_checked

    run_checked(config, environment)


if __name__ == "__main__":
    main()
