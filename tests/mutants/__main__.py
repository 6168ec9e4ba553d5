"""Tries seeded defects: `python -m tests.mutants [FOLDER ...] [--name TEXT] [--count N --seed N]`."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from tests.mutants.defects import FOLDERS, draw, load
from tests.mutants.report import is_good, summary, table
from tests.mutants.trial import attempt_all

HERE = Path(__file__).parent
TREE = HERE.parent.parent
SECONDS = 180.0


def main(arguments: Sequence[str]) -> int:
    """0 where enough defects were caught and every other one has its reason, 1 where not."""
    options = _parser().parse_args(arguments)
    folders, texts = options.folders or FOLDERS, options.name or [""]
    chosen = [
        defect
        for defect in load(HERE)
        if defect.folder in folders and any(text in defect.name for text in texts)
    ]
    if not chosen:
        print("error: no defect of that folder and name; tests/mutants/*.toml has them all", file=sys.stderr)
        return 2
    if options.count is not None:
        seed = date.today().toordinal() if options.seed is None else options.seed
        chosen = draw(chosen, options.count, seed)
        print(f"mutants: {len(chosen)} drawn with --count {options.count} --seed {seed}", flush=True)
    began = time.monotonic()
    outcomes = attempt_all(chosen, TREE, workers=options.workers, seconds=options.seconds)
    print(table(outcomes))
    print(f"mutants: {time.monotonic() - began:.0f} seconds")
    if options.write:
        described = summary(outcomes) | {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
            "seconds": round(time.monotonic() - began),
        }
        options.write.write_text(json.dumps(described, indent=1) + "\n")
    return 0 if is_good(outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("folders", nargs="*", help=f"of {', '.join(FOLDERS)}; all by default")
    parser.add_argument("--name", action="append", help="only those with this in their name")
    parser.add_argument("--count", type=int, help="draw this many")
    parser.add_argument("--seed", type=int, help="of the draw; the number of the day unless given")
    parser.add_argument("--workers", type=int, default=1, help="that run tests at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the tests of one defect")
    parser.add_argument("--write", type=Path, help="a JSON file for the counts and the survivors")
    return parser


def _commit() -> str:
    command = ["git", "-C", str(TREE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
