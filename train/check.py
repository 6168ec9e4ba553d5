"""`python -m train.check [group=option] [key=value]`: what a run is, or why it cannot start."""

import sys
from collections.abc import Sequence

from conf.errors import exit_on_error
from train.config.load import load_config


def main(overrides: Sequence[str]) -> None:
    """Prints the tables that a run prints before its first step. Nothing is built and no data is read.

    Raises ConfigError with everything that keeps the run from starting on all processes of its cluster; what
    this machine lacks does not count.
    """
    config = load_config(overrides, None)
    from train.config.show import show_config

    show_config(config, config.cluster.nodes * config.cluster.gpus_per_node)


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
