"""The table of recipes for whole runs in docs/planning.md, planned from their configs.

`python -m bench.recipes` prints it; `python -m bench.recipes write` puts it into docs/planning.md.
"""

from bench.tables import show
from conf.compose import CONF_DIR, group_options
from conf.help import Page, run
from parallel.config.degrees import Degrees
from train.config.load import load_config
from train.estimate.memory import memory_per_rank


def main(arguments: list[str]) -> None:
    """Prints or writes the table."""
    show(table(), "recipes", arguments)


def table() -> str:
    """One line for each recipe that names its model, in Markdown."""
    lines = ["| recipe | ranks | tokens of a row | memory per rank, planned |", "|" + "---|" * 4]
    lines += [row(name) for name in whole_runs()]
    return "\n".join(lines) + "\n"


def whole_runs() -> list[str]:
    """The recipes that are a run of their own, with model and cluster."""
    files = {name: (CONF_DIR / "recipe" / f"{name}.yaml").read_text() for name in group_options("recipe")}
    return [name for name, text in files.items() if "override /model:" in text]


def row(name: str) -> str:
    """Degrees above one, and the memory of the fullest rank."""
    config = load_config([f"recipe={name}"], None)
    size = config.cluster.nodes * config.cluster.gpus_per_node
    degrees = config.parallel.degrees(size)
    cells = (
        f"`{name}`",
        shown(degrees),
        f"{config.data.sequence_length:,}",
        f"{memory_per_rank(config, size).total / 2**30:.1f} GiB",
    )
    return "| " + " | ".join(cells) + " |"


def shown(degrees: Degrees) -> str:
    """The degrees above one; experts last, whose ranks are among the others."""
    named = {"pp": degrees.pp, "dp": degrees.batch, "cp": degrees.cp, "tp": degrees.tp, "ep": degrees.ep}
    return " ".join(f"{axis} {degree}" for axis, degree in named.items() if degree > 1)


if __name__ == "__main__":
    run(main, Page(__doc__ or "", ("python -m bench.recipes", "python -m bench.recipes write")))
