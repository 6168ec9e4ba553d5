"""Names in messages."""

from collections.abc import Iterable


def shortened(names: Iterable[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
