"""`python -m train.check [group=option] [key=value]`: what a run is, or why it cannot start.

Nothing is built and no data is read. It is checked for all processes of its cluster; what this machine lacks
does not count.
"""

from collections.abc import Sequence

from conf.help import run
from train.config.help import run_page

PAGE = run_page(
    __doc__,
    (
        "python -m train.check recipe=kimi_linear_48b_h100_8n",
        "python -m train.check layout=kda_3to1 optim.lr=3e-4",
    ),
)


def main(overrides: Sequence[str]) -> None:
    """Prints the tables that a run prints before its first step.

    Raises ConfigError with everything that keeps the run from starting.
    """
    from train.config.load import load_config

    config = load_config(overrides, None, starts=True)
    from train.config.show import show_config

    show_config(config, config.cluster.nodes * config.cluster.gpus_per_node)


if __name__ == "__main__":
    run(main, PAGE)
