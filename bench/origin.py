"""Where figures come from: what stands at the head of every result file."""

import platform
import subprocess
from typing import Any

import torch


def origin(how: str, device: str = f"{platform.machine()} CPU") -> dict[str, Any]:
    """The device and how it was used, torch's version, and the commit of this tree; "" where git has none."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {"device": f"{device}, {how}", "torch": torch.__version__, "commit": commit}
