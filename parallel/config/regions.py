"""Names of the parts of blocks that backward computes again: the line `parallel.recompute`."""

from collections.abc import Collection

from conf.errors import Violation
from conf.known_keys import did_you_mean
from model.layout import DENSE, MOE, NONE

FULL = "full"
KEY = "parallel.recompute"


def region_names(line: str) -> frozenset[str]:
    """What a line names, nothing for `none`."""
    return frozenset(line.split()) - {NONE}


def ffn_region(ffn: str) -> str:
    """The name of the region of a feed-forward half: by whether it has routed experts."""
    return ffn if ffn in (DENSE, NONE) else MOE


def region_violations(line: str, mixers: Collection[str]) -> list[Violation]:
    """What a line names that a model with these mixers does not have."""
    names = line.split()
    legal = [NONE, FULL, MOE, DENSE, *sorted(set(mixers) - {NONE})]
    found = [
        Violation(KEY, f"{name!r} is not one of {', '.join(legal)}{did_you_mean(name, legal)}")
        for name in dict.fromkeys(names)
        if name not in legal
    ]
    alone = [name for name in (NONE, FULL) if name in names]
    if not names:
        found.append(Violation(KEY, f"found nothing; legal are {', '.join(legal)}"))
    elif alone and len(names) > 1:
        found.append(Violation(KEY, f"{alone[0]} stands alone; found {line!r}"))
    return found
