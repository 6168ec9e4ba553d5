"""The table of all published systems in docs/models.md, counted from their configs.

`python -m bench.systems` prints it; `python -m bench.systems write` puts it into docs/models.md.
"""

from bench.tables import show
from conf.compose import compose, group_options
from conf.help import Page, run
from model.config import Architecture
from model.count import count


def main(arguments: list[str]) -> None:
    """Prints or writes the table."""
    show(table(), "systems", arguments)


def table() -> str:
    """One line for each system, in Markdown."""
    lines = ["| `model=` | parameters | active | layers | width | mixers | experts |", "|" + "---|" * 7]
    lines += [row(name) for name in group_options("model") if not name.endswith("_small")]
    return "\n".join(lines) + "\n"


def row(name: str) -> str:
    """Parameters without MTP modules; active ones with embedding and head."""
    config = compose([f"model={name}"], Architecture)
    counts = count(config)
    mixers: dict[str, int] = {}
    for layer in config.layers:
        mixers[layer.mixer] = mixers.get(layer.mixer, 0) + 1
    has_experts = any(layer.ffn not in ("dense", "none") for layer in config.layers)
    experts = f"{config.moe.top_k} of {config.moe.num_experts}" if has_experts else "none"
    if has_experts and config.moe.num_zero_experts:
        experts += f" + {config.moe.num_zero_experts} zero"
    cells = (
        *(f"`{name}`", f"{counts.main / 1e9:,.2f} B", f"{counts.active / 1e9:,.2f} B"),
        *(str(config.model.depth), str(config.model.width)),
        " ".join(f"{number} {mixer}" for mixer, number in mixers.items() if mixer != "none"),
        experts,
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    run(main, Page(__doc__ or "", ("python -m bench.systems", "python -m bench.systems write")))
