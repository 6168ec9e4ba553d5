"""Which state of the repository the code is."""

import json
import subprocess
from pathlib import Path
from typing import Any

# What a copy of the code has, which is in no repository.
REVISION_FILE = "REVISION"
PACKAGES = ("conf", "kernels", "data", "model", "parallel", "train", "slurm")
_SECONDS = 10


def revision(root: Path) -> dict[str, Any]:
    """`commit`, and `uncommitted`: whether the packages under `root` differ from it; both None if unknown."""
    unknown = {"commit": None, "uncommitted": None}
    try:
        if (root / REVISION_FILE).exists():
            return unknown | json.loads((root / REVISION_FILE).read_text())
        # A directory of runs may lie in another repository, or in this one.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return unknown
        changes = _git(root, "status", "--porcelain", "--", *PACKAGES)
        return {"commit": _git(root, "rev-parse", "HEAD"), "uncommitted": bool(changes)}
    except (OSError, ValueError, subprocess.SubprocessError):
        return unknown


def _git(root: Path, *words: str) -> str:
    # Without locks: a run only reads.
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout.strip()
