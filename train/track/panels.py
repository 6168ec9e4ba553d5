"""What Weights & Biases shows of a run: names, and values that are more than a number."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# One panel for each layer would be hundreds; metrics.jsonl has them.
_OF_ONE_LAYER = re.compile(r"router/.*_\d+")


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
