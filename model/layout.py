"""The layout grammar: one line tiles mixer names over the depth, `first` and `last` override the ends.

    pattern := item+        item := [COUNT "*"] (NAME | "(" pattern ")")

"3*gdn attn" is gdn gdn gdn attn, repeated from layer 0 to the last.
"""

import re
from collections.abc import Collection
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from conf.compose import Config
from conf.names import listed

NONE = "none"
DENSE, MOE, HASH, SHORTCUT = "dense", "moe", "hash", "shortcut"
FFNS = (MOE, DENSE, HASH, SHORTCUT, NONE)
_TOKEN = re.compile(r"\s*(?:(\d+)\s*\*|([A-Za-z_]\w*)|([()]))")


def parse(pattern: str) -> tuple[str, ...]:
    """The names of a pattern in order, repeats and groups written out.

    Raises ValueError that shows where the pattern stops making sense.
    """
    names, end = _parse_items(pattern, 0, is_group=False)
    if pattern[end:].strip():
        raise ValueError(f"cannot read {pattern[end:].strip()!r} in {pattern!r}; write items as 3*gdn attn")
    return tuple(names)


def _parse_items(text: str, at: int, *, is_group: bool) -> tuple[list[str], int]:
    names: list[str] = []
    while match := _TOKEN.match(text, at):
        count, name, bracket = match.groups()
        if bracket == ")":
            if not is_group:
                break
            return names, match.end()
        repeat = 1
        at = match.end()
        if count is not None:
            repeat = int(count)
            match = _TOKEN.match(text, at)
            if repeat < 1 or match is None or match.group(1) or match.group(3) == ")":
                raise ValueError(f"{count}* in {text!r} needs a count of 1 or more, then a name or a group")
            name, bracket, at = match.group(2), match.group(3), match.end()
        if bracket == "(":
            group, at = _parse_items(text, at, is_group=True)
            if not group:
                raise ValueError(f"empty group in {text!r}")
            names += group * repeat
        else:
            names += [name] * repeat
    if is_group:
        raise ValueError(f"a group in {text!r} is not closed with )")
    return names, at


def _readable(pattern: str) -> str:
    parse(pattern)
    return pattern


def _not_empty(pattern: str) -> str:
    if not parse(pattern):
        raise ValueError("needs at least one name")
    return pattern


Line = Annotated[str, AfterValidator(_readable)]
Pattern = Annotated[str, AfterValidator(_not_empty)]


class FfnLayoutConfig(Config):
    """Which feed-forward each layer has.

    moe: routed experts. dense. hash: experts chosen by token id. shortcut: dense, and experts whose output
    joins a layer later. none.
    """

    pattern: Pattern
    first: Line
    last: Line


class LayoutConfig(Config):
    """Which token mixer each layer has, by name of an entry of `mixer`, or `none`."""

    pattern: Pattern
    first: Line
    last: Line
    ffn: FfnLayoutConfig


class Layer(NamedTuple):
    """What stands at one depth."""

    mixer: str
    ffn: str


def expand(pattern: str, first: str, last: str, depth: int) -> tuple[str, ...]:
    """`depth` names: the pattern tiled by absolute layer index, the ends replaced by `first` and `last`.

    Raises ValueError when the ends do not fit into the depth.
    """
    period, head, tail = parse(pattern), parse(first), parse(last)
    if len(head) + len(tail) > depth:
        raise ValueError(f"first and last name {len(head)} + {len(tail)} layers, but the depth is {depth}")
    names = [period[layer % len(period)] for layer in range(depth)]
    names[: len(head)] = head
    names[depth - len(tail) :] = tail
    return tuple(names)


def expand_layers(config: LayoutConfig, depth: int, mixers: Collection[str]) -> tuple[Layer, ...]:
    """What stands at each depth. Raises ValueError, prefixed by the key, for a layout that does not fit."""
    lines = {}
    for key, line in (("layout", config), ("layout.ffn", config.ffn)):
        try:
            lines[key] = expand(line.pattern, line.first, line.last, depth)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    _check_names("layout", config, [*mixers, NONE])
    _check_names("layout.ffn", config.ffn, FFNS)
    layers = tuple(Layer(*pair) for pair in zip(lines["layout"], lines["layout.ffn"], strict=True))
    for index, layer in enumerate(layers):
        if layer == (NONE, NONE):
            raise ValueError(f"layout: layer {index} has neither a mixer nor a feed-forward")
        after = layers[index + 1].ffn if index + 1 < depth else NONE
        if layer.ffn == SHORTCUT and after != DENSE:
            raise ValueError(f"layout.ffn: layer {index} is a shortcut, so layer {index + 1} must be dense")
    return layers


def _check_names(key: str, line: LayoutConfig | FfnLayoutConfig, known: Collection[str]) -> None:
    for field in ("pattern", "first", "last"):
        for name in parse(getattr(line, field)):
            if name not in known:
                legal = listed(sorted(known), "mixer" if key == "layout" else "layout", near=name)
                raise ValueError(f"{key}.{field}: {name!r} is not one of {legal}")
