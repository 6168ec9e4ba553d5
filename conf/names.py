"""Names in messages."""

import difflib
from collections.abc import Iterable, Sequence

from conf.known_keys import did_you_mean

# So many names are read at a glance.
MOST = 12


def shortened(names: Iterable[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def listed(names: Sequence[str], section: str, near: str | None = None) -> str:
    """All names where they are few, else those like `near`, how many more there are, and where all stand.

    section is the one whose page of --help lists them.
    """
    question = did_you_mean(near, names) if near is not None else ""
    if len(names) <= MOST:
        return ", ".join(names) + question
    close = difflib.get_close_matches(near or "", names, n=4, cutoff=0.4) or list(names[:4])
    return f"{', '.join(close)} and {len(names) - len(close)} more, see --help={section}{question}"
