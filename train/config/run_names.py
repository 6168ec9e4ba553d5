"""What a run is called where it is shown beside others."""

import os
from pathlib import Path
from typing import Any

from conf.keys import default_option
from conf.user_files import Given

# The most that Weights & Biases takes.
_LONGEST = 128


def with_names(tree: dict[str, Any], given: Given | None) -> dict[str, Any]:
    """The tree with `track.name` and `track.group` where they are null.

    given is what it was made of; None is a config of old, whose group stays as it is. Whatever is of a wrong
    type stays as it is, for `validate` to name.
    """
    run, track = tree.get("run"), tree.get("track")
    if not isinstance(run, dict) or not isinstance(track, dict) or not isinstance(run.get("dir"), str):
        return tree
    named = dict(track)
    if named.get("name", "") is None:
        named["name"] = _last_part(run["dir"]) or None
    if named.get("group", "") is None and given is not None:
        named["group"] = group_of(given.all_values())[:_LONGEST] or None
    return {**tree, "track": named}


def group_of(typed: dict[str, Any]) -> str:
    """The recipe that was typed; else the model, or the weights that it starts from, and a typed layout."""
    if isinstance(recipe := typed.get("recipe"), str):
        return recipe
    start = typed.get("train.start")
    model = Path(start).name if isinstance(start, str) else default_option("model")
    words = [typed.get("model", model), typed.get("layout"), typed.get("layout.pattern")]
    return " ".join(word for word in words if isinstance(word, str))


def sweep_names(directory: str, number: int, own: str) -> dict[str, str]:
    """Name and group of a run of the sweep in a directory; own are the overrides in which it differs."""
    return {"name": f"{number} {own}".strip()[:_LONGEST], "group": _last_part(directory)}


def _last_part(directory: str) -> str:
    # Links are not followed: the name is the same on all nodes.
    return Path(os.path.abspath(directory)).name[:_LONGEST]
