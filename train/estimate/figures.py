"""Figures that follow from the config of a run alone, as tables for people or JSON for programs."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from train.config.run_config import RunConfig


def print_figures(
    overrides: Sequence[str],
    figures_of: "Callable[[RunConfig], dict[str, Any]]",
    show: "Callable[[dict[str, Any], RunConfig], None]",
    section: Literal["plan", "rehearse"],
) -> None:
    """Prints the figures of the config that the overrides give, by `show` or, with format=json, on one line.

    section is the part of the config that holds `format`. The run is that of all processes of its cluster.
    Raises ConfigError with all that is wrong.
    """
    from train.config.load import load_config

    config = load_config(overrides, None)
    figures = figures_of(config)
    if getattr(config, section).format == "json":
        print(json.dumps(figures))
    else:
        show(figures, config)


def readable_bytes(value: float) -> str:
    """Bytes in the unit that keeps them between 1 and 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.4g} {unit}"
        value /= 1024
    return f"{value:,.4g} TiB"
