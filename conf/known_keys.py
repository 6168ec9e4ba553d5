"""Every key that a config can hold, and those that a mistyped one may mean."""

import difflib
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

# Of a key with a dot in it where each part is a key of its own.
ONE_NAME = "YAML reads it as one name; write each part on a line of its own, below the one before"
# Of a part of the config below a group that is not its own.
FLAT = "a file of options has the keys of its group alone, or begins with the line `# @package _global_`"
# More would hide the one that was meant.
MOST = 3


def known_keys(root: type[BaseModel], tree: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of `root`, with the names that mappings of `tree` hold and the kinds of its nodes."""
    for name, field in root.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        yield from _below(field.annotation, key, tree.get(name) if isinstance(tree, Mapping) else None)


def _below(annotation: Any, key: str, node: Any) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from known_keys(annotation, node, f"{key}.")
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict and isinstance(node, Mapping):
        for name, entry in node.items():
            yield from _below(arguments[1], f"{key}.{name}", entry)
    elif origin is typing.Annotated:
        yield from _below(arguments[0], key, node)
    elif origin in (typing.Union, types.UnionType):
        for argument in _of_kind(arguments, key, node):
            yield from _below(argument, key, node)


def _of_kind(members: Collection[Any], key: str, node: Any) -> Collection[Any]:
    """The members of a union of the kind of the node, which is its name where it has none; else all."""
    name = key.rsplit(".", 1)[-1]
    kind = node.get("kind", name) if isinstance(node, Mapping) else name
    chosen = [member for member in members if _kind(member) == kind]
    return chosen or members


def _kind(member: Any) -> Any:
    is_node = isinstance(member, type) and issubclass(member, BaseModel)
    return member.model_fields["kind"].default if is_node and "kind" in member.model_fields else None


def closest_keys(key: str, known: Iterable[str]) -> str:
    """A trailing question with the keys that an unknown one may mean, or nothing when none is close."""
    others = list(dict.fromkeys(other for other in known if other != key))
    parent, _, name = key.rpartition(".")
    namesakes = [other for other in others if f".{other}".endswith(f".{key}")]
    namesakes = namesakes or [other for other in others if other.rpartition(".")[2] == name]
    if 0 < len(namesakes) <= MOST:
        return did_you_mean_any(namesakes)
    siblings = [other.rpartition(".")[2] for other in others if other.rpartition(".")[0] == parent]
    # A bare name is more often a key that lacks its group than a group.
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5 if parent else 0.7)
    if close:
        return did_you_mean_any([f"{parent}.{close[0]}" if parent else close[0]])
    if namesakes:
        return did_you_mean_any(difflib.get_close_matches(key, namesakes, n=MOST, cutoff=0.0))
    # The whole key would be like any other below the same parent.
    names = {other.rpartition(".")[2] for other in others}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.65)
    meant = [other for other in others if other.rpartition(".")[2] in close]
    return did_you_mean_any(difflib.get_close_matches(key, meant, n=MOST, cutoff=0.0)) if meant else ""


def did_you_mean_any(keys: list[str]) -> str:
    """A trailing question with all of these."""
    *first, last = keys
    return f"; did you mean {', '.join(first)} or {last}?" if first else f"; did you mean {last}?"


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A trailing question with the closest candidate, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return did_you_mean_any(close) if close else ""
