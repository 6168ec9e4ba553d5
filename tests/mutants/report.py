"""What a run over defects says: a table by folder, survivors by name, and whether that is good."""

from collections.abc import Sequence
from typing import Any

from tests.mutants.trial import Outcome

VERDICTS = ("caught", "timed out", "lived", "broken", "unproven")
# A hang is noticed too: the suite ends a test that takes too long.
NOTICED = ("caught", "timed out")
SHARE = 0.95


def is_good(outcomes: Sequence[Outcome]) -> bool:
    """Whether 95 % were noticed, and each of the others is one with a stated reason to live."""
    noticed = [outcome for outcome in outcomes if outcome.verdict in NOTICED]
    excused = [outcome for outcome in outcomes if outcome.verdict == "lived" and outcome.defect.lives]
    return len(noticed) >= SHARE * len(outcomes) and len(noticed) + len(excused) == len(outcomes)


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by folder, and every defect that no test noticed."""
    counts = _counts(outcomes)
    heads = ("folder", "defects", *VERDICTS)
    rows = [[folder, sum(row.values()), *row.values()] for folder, row in counts.items()]
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    lines = ["  ".join(f"{cell!s:>9}" for cell in row) for row in (heads, *rows)]
    for outcome in outcomes:
        if outcome.verdict != "caught":
            defect = outcome.defect
            reason = f"; stated reason: {defect.lives}" if defect.lives else ""
            lines.append(f"{outcome.verdict}: {defect.name} ({defect.file}): {defect.breaks}{reason}")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The same as values for JSON."""
    return {
        "folders": _counts(outcomes),
        "not_caught": [
            {"name": outcome.defect.name, "verdict": outcome.verdict, "reason": outcome.defect.lives}
            for outcome in outcomes
            if outcome.verdict != "caught"
        ],
    }


def _counts(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    folders = sorted({outcome.defect.folder for outcome in outcomes})
    found = {folder: {str(verdict): 0 for verdict in VERDICTS} for folder in folders}
    for outcome in outcomes:
        found[outcome.defect.folder][outcome.verdict] += 1
    return found
