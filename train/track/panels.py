"""What Weights & Biases shows of a run: names, and values that are more than a number."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# One panel for each layer would be hundreds; metrics.jsonl has them.
_OF_ONE_LAYER = re.compile(r"router/.*_\d+")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


def of_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a line of metrics that have a panel."""
    return {
        name: value for name, value in values.items() if "/" in name and not _OF_ONE_LAYER.fullmatch(name)
    }


def heat_map(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A picture of layers by experts, 1 the mean of a layer, with a histogram of all of them beside it."""
    return {"shown_as": "heat_map", "rows": rows}


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Rows under named columns."""
    return {"shown_as": "table", "columns": list(columns), "rows": rows}


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run without the values of variables of its job that are called like a secret."""
    slurm = config.get("slurm")
    if not slurm or not slurm.get("env"):
        return dict(config)
    env = {name: "..." if _SECRET.search(name) else value for name, value in slurm["env"].items()}
    return {**config, "slurm": {**slurm, "env": env}}
