"""The types and ranges of keys in words, from the pydantic fields that check them."""

import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def key_type(root: type[BaseModel], parts: Sequence[str], kind: str | None) -> str | None:
    """The type and range of a key, such as "whole number >= 1, or null"; None where the root leaves it open.

    kind picks one where a node on the way may be of several.
    """
    annotation: Any = root
    metadata: Sequence[Any] = ()
    for part in parts:
        below = _below(annotation, part, kind)
        if below is None:
            return None
        annotation, metadata = below
    return _in_words(annotation, metadata)


def _below(annotation: Any, part: str, kind: str | None) -> tuple[Any, Sequence[Any]] | None:
    """Annotation and constraints of the field or entry of that name."""
    fitting = []
    for member in _members(annotation):
        if typing.get_origin(member) is dict:
            return typing.get_args(member)[1], ()
        if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
            fitting.append(member)
    fitting.sort(key=lambda model: kind is None or _kind(model) != kind)
    if not fitting:
        return None
    field = fitting[0].model_fields[part]
    return field.annotation, field.metadata


def _kind(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return None if field is None else field.default


def _members(annotation: Any) -> Iterator[Any]:
    """What an annotation may be: the members of a union, without their constraints."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _in_words(annotation: Any, metadata: Iterable[Any]) -> str | None:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _in_words(arguments[0], (*metadata, *arguments[1:]))
    if origin in (typing.Union, types.UnionType):
        words = [_in_words(member, metadata) for member in arguments if member is not types.NoneType]
        known = [word for word in words if word is not None]
        return " or ".join(known) + (", or null" if types.NoneType in arguments else "") if known else None
    if origin is typing.Literal:
        names = [str(name) for name in arguments]
        return " or ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
    if origin in (list, tuple):
        return f"list of {_in_words(arguments[0], ()) or 'anything'}"
    if origin is dict:
        return f"mapping of names to {_in_words(arguments[1], ()) or 'anything'}"
    word = _WORDS.get(annotation)
    return word and " ".join((word, *_range(metadata)))


def _range(metadata: Iterable[Any]) -> list[str]:
    """The bounds among the constraints, such as [">= 0, < 1"]."""
    # Within Annotated a Field stands as a whole, and holds its bounds itself.
    flat = [bound for entry in metadata for bound in (entry, *getattr(entry, "metadata", ()))]
    found = [
        f"{sign} {getattr(bound, name)}"
        for bound in flat
        for name, sign in _BOUNDS.items()
        if getattr(bound, name, None) is not None
    ]
    return [", ".join(found)] if found else []


def value_type(value: object) -> str | None:
    """The type of a value in words, where that is all that is known; None for null and a reference."""
    if isinstance(value, list):
        return "list"
    return None if isinstance(value, str) and value.startswith("${") else _WORDS.get(type(value))
