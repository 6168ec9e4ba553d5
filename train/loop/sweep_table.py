"""The table that closes a sweep: its runs, best first."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.errors import STOPPED
from train.loop.report import RESULT_FILE
from train.track.metrics_file import read
from train.track.report import print_table
from train.track.tracker import METRICS

HELD_OUT = "held-out loss (nats per token)"


@dataclass(frozen=True)
class Ended:
    """How one run of a sweep ended. code is None of one that was not begun; own is what it alone has.

    is_claimed: the directory is this run's, and so is what stands in it.
    """

    directory: str
    own: str
    code: int | None = None
    is_claimed: bool = False

    def with_code(self, code: int, *, is_claimed: bool = True) -> "Ended":
        """The same run with its exit code."""
        return replace(self, code=code, is_claimed=is_claimed)


def show_sweep(runs: Sequence[Ended]) -> None:
    """Prints the runs: those with a held-out loss by that, then by loss of the last step, then the rest."""
    scored = sorted(((score_of(run), run) for run in runs), key=lambda pair: pair[0][:2])
    rows = {run.directory: (shown, run.own, how(run)) for (*_, shown), run in scored}
    print_table("Sweep", rows, ("run.dir", "loss", "overrides", "ended"))


def score_of(run: Ended) -> tuple[int, float, str]:
    """What a run is sorted by, least first, and the loss as it is shown."""
    directory = Path(run.directory)
    if run.code == 0:
        result: dict[str, Any] = json.loads((directory / RESULT_FILE).read_text())
        if math.isfinite(result.get(HELD_OUT, math.nan)):
            return 0, result[HELD_OUT], f"{result[HELD_OUT]:.4f} held out"
    lines = read(directory / METRICS, ("loss",)) if run.is_claimed else []
    lines = [line for line in lines if line["loss"] is not None]
    if lines:
        return 1, lines[-1]["loss"], f"{lines[-1]['loss']:.4f} at step {lines[-1]['step']}"
    return 2, 0.0, "none"


def how(run: Ended) -> str:
    """How a run ended, in words."""
    words = {None: "not started", 0: "done", STOPPED: "stopped, saved"}
    return words.get(run.code, f"failed with {run.code}")
