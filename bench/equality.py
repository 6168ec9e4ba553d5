"""How far every mixer in every layout is from one process: the table in docs/parallelism.md.

`make equality` measures and writes bench/results/equality.json. `python -m bench.equality` prints its table;
`python -m bench.equality write` puts it into docs/parallelism.md.
"""

import json
from pathlib import Path
from typing import Any

from bench.origin import origin
from bench.tables import show
from conf.help import Page, run

RESULT = Path("bench/results/equality.json")

# Kind of difference by precision, layout and mixer.
Measured = dict[str, dict[str, dict[str, dict[str, float]]]]


def main(arguments: list[str]) -> None:
    """Prints or writes the table."""
    show(table(), "equality", arguments)


def table() -> str:
    """One line for each mixer, one column for each layout, the worst relative difference, in Markdown."""
    found: Measured = json.loads(RESULT.read_text())["worst"]
    lines = []
    for precision, layouts in found.items():
        lines += [f"| {precision} | {' | '.join(layouts)} |", "|" + "---|" * (len(layouts) + 1)]
        for mixer in next(iter(layouts.values())):
            cells = (f"{max(mixers[mixer].values()):.0e}" for mixers in layouts.values())
            lines.append(f"| `{mixer}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def write(found: Measured, steps: int, limit: float) -> None:
    """Writes the result file. The limit is that of float64."""
    described: dict[str, Any] = {
        **origin("gloo"),
        "steps": steps,
        "limit": limit,
        "worst": found,
    }
    RESULT.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    run(main, Page(__doc__ or "", ("python -m bench.equality", "python -m bench.equality write")))
