"""Random damage of files, from a seed: what a disk, a copy or a hand leaves."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRONG = [
    None,
    -1,
    0,
    1.5,
    "x",
    "",
    [],
    {},
    True,
    10**12,
    -(10**30),
    [1],
    {"a": 1},
    "null",
    [None],
    "${a.b}",
    "a,b",
]


def damage(file: Path, draw: random.Random, head: int | None = None) -> None:
    """Changes one file: a value of JSON as often as bytes, which are of the first `head`."""
    if file.suffix == ".json" and draw.random() < 0.5:
        damage_json(file, draw)
    else:
        damage_bytes(file, draw, head)


def damage_json(file: Path, draw: random.Random) -> None:
    """One value is another one, or is not there."""
    tree = json.loads(file.read_text())
    *above, last = draw.choice([*_paths(tree)])
    node = tree
    for key in above:
        node = node[key]
    if draw.random() < 0.2:
        del node[last]
    else:
        node[last] = draw.choice(WRONG)
    file.write_text(json.dumps(tree))


def damage_bytes(file: Path, draw: random.Random, head: int | None = None) -> None:
    """Cut short, some bytes of the head changed, or gone."""
    content, kind = bytearray(file.read_bytes()), draw.randrange(3)
    if kind == 0 or not content:
        file.write_bytes(content[: draw.randrange(len(content) or 1)])
    elif kind == 1:
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(min(len(content), head or len(content)))] = draw.randrange(256)
        file.write_bytes(content)
    else:
        file.unlink()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a JSON file stand."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield (*path, key)
        yield from _paths(entry, (*path, key))
