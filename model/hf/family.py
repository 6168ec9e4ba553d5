"""What each family of published checkpoints is: its config and its tensors, both ways."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor

import model.hf.families
from conf.errors import CheckpointError
from conf.known_keys import did_you_mean
from model.config import Architecture
from model.hf.fields import Fields, shown
from model.hf.pieces import Mapped, Piece
from model.initial import float32_names
from model.language_model import LanguageModel


def _nothing(_: Any) -> list[Any]:
    return []


def _no_fields(_: Architecture) -> dict[str, Any]:
    return {}


def _no_copies(_: Architecture) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Nested:
    """Where the text model is in the config.json of a model with more parts, such as a vision tower.

    model_types: of the fields that stand within `field`; the first is written. silent: fields beside it that
    speak of the other parts. outer: the object that `field` stands in, where it is one part of several that
    are nested themselves; silent are fields beside either. is_tied: what transformers takes for the tied
    embeddings of the whole model where the config does not say, None that of the text model.
    """

    model_types: tuple[str, ...]
    field: str = "text_config"
    silent: tuple[str, ...] = ()
    outer: str | None = None
    is_tied: bool | None = False


@dataclass(frozen=True)
class Family:
    """One model_type. A file of model/hf/families/ lists its families as FAMILIES.

    pairs: fields of config.json and the keys of ours that hold the same value; a field with a default, the
    pair (key, default), may be absent. fixed: overrides that all members share. expects: fields with the only
    values that we build. read_more, write_more: what is not a plain value. pieces: where the tensors stand.
    aliases: other names of fields, to the names in pairs.
    ignored: patterns of tensors that carry nothing of the model, such as buffers that follow from the config.
    mtp: the pattern of the tensors of MTP modules, where {depth} is the number of
    layers; transformers drops these, and a directory without them loads without them.
    copies: names of tensors that repeat another one, to its name; written, and to be among those ignored.
    derived: tensors that follow from the config, but that transformers misses; written, and to be among those
    ignored.
    surplus: names of tensors that transformers writes though nothing reads them; ignored.
    nested: where the fields stand when they are not the config.json itself.
    left_out: patterns of tensors of other parts, such as a vision tower; {beyond} is the index of any layer
    behind the last. Loading says how many it leaves out.
    is_second: another family holds the same models; this one is written when it is asked for.
    float32: patterns of further tensors that the published checkpoints hold in float32 beside all others.
    instead: other pieces of some of our tensors, such as fused experts. A tensor is read by the first that a
    directory has all names of, in the shapes that they give; it is written by `pieces`.
    """

    model_type: str
    class_name: str
    pairs: Mapping[str, str | tuple[str, Any]]
    pieces: Callable[[Architecture], Iterable[Piece]]
    fixed: tuple[str, ...] = ()
    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    read_more: Callable[[Fields], list[str]] = _nothing
    write_more: Callable[[Architecture], dict[str, Any]] = _no_fields
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    mtp: str | None = None
    copies: Callable[[Architecture], Mapping[str, str]] = _no_copies
    derived: Callable[[Architecture], Iterable[tuple[str, Tensor]]] = _nothing
    surplus: Callable[[Architecture], Iterable[str]] = _no_copies
    nested: Nested | None = None
    left_out: tuple[str, ...] = ()
    is_second: bool = False
    float32: tuple[str, ...] = ()
    instead: tuple[Callable[[Architecture], Iterable[Piece]], ...] = ()

    def leaves_out(self, config: Architecture, names: Iterable[str]) -> set[str]:
        """Those of the names that belong to other parts."""
        depth = config.model.depth
        beyond = "|".join(str(depth + mtp) for mtp in range(MAX_MTP_DEPTH))
        patterns = [pattern.replace("{beyond}", f"(?:{beyond})") for pattern in self.left_out]
        return {name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)}

    def float32_of(self, mapped: Mapped, model: LanguageModel) -> set[str]:
        """Those of our tensors that no cast narrows: declared by the model, or float32 in this family."""
        pattern = "|".join(self.float32)
        found = {
            piece.ours
            for name, parts in mapped.by_theirs.items()
            if self.float32 and re.fullmatch(pattern, name)
            for piece in parts
        }
        return found | float32_names(model)

    def pieces_found(self, config: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
        """Where every tensor stands in a directory with these names and shapes."""
        chosen: dict[str, list[Piece]] = {}
        for pieces in self.instead:
            found: dict[str, list[Piece]] = {}
            for piece in pieces(config):
                found.setdefault(piece.ours, []).append(piece)
            for ours, parts in found.items():
                if all(
                    part.shape in (None, shapes.get(part.theirs)) and part.theirs in shapes for part in parts
                ):
                    chosen.setdefault(ours, parts)
        yield from (piece for piece in self.pieces(config) if piece.ours not in chosen)
        for parts in chosen.values():
            yield from parts

    def read(self, fields: Fields) -> list[str]:
        """Overrides for our config groups. Raises CheckpointError for fields that we cannot build."""
        nested = self.nested
        if nested is None:
            return self._read(fields)
        beside = fields if nested.outer is None else fields.node(nested.outer)
        within = beside.node(nested.field, self.aliases)
        within.expect("model_type", *nested.model_types)
        for name in nested.silent:
            fields.take(name, None)
            beside.take(name, None)
        if (tied := beside.take(TIED, nested.is_tied)) is not None:
            within.settle(TIED, tied)
        found = self._read(within)
        within.finish()
        if beside is not fields:
            beside.finish()
        return found

    def _read(self, fields: Fields) -> list[str]:
        found = list(self.fixed)
        for name, key in self.pairs.items():
            key, default = (key, ()) if isinstance(key, str) else (key[0], key[1:])
            found.append(f"{key}={shown(fields.take(name, *default))}")
        for name, allowed in self.expects.items():
            fields.expect(name, *allowed)
        return [*found, *self.read_more(fields)]

    def write(self, config: Architecture) -> dict[str, Any]:
        """Fields of a config.json. Raises CheckpointError for an architecture of another family."""
        found = self._write(config)
        if self.nested is None:
            return found
        outside = {TIED: found[TIED]} if TIED in found else {}
        written = {self.nested.field: {"model_type": self.nested.model_types[0], **found}, **outside}
        return written if self.nested.outer is None else {self.nested.outer: written}

    def _write(self, config: Architecture) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, key in self.pairs.items():
            value: Any = config
            for part in (key if isinstance(key, str) else key[0]).split("."):
                value = value[part] if isinstance(value, dict) else getattr(value, part, _ABSENT)
                if value is _ABSENT:
                    raise CheckpointError(f"{self.model_type}: has no {key}")
            found[name] = value
        found |= {name: allowed[0] for name, allowed in self.expects.items()}
        return found | self.write_more(config)


_ABSENT = object()
TIED = "tie_word_embeddings"
MAX_MTP_DEPTH = 16


def inside(
    text: Family,
    model_type: str,
    class_name: str,
    nested: Nested,
    prefixes: Mapping[str, str],
    **changes: Any,
) -> Family:
    """The family of a model that holds `text` beside other parts.

    prefixes: how the names of its tensors start, to how they start here; "" takes those that no other takes.
    changes: other fields of the family, such as left_out; patterns are of whole names as they are here.
    """

    def moved(
        pieces: Callable[[Architecture], Iterable[Piece]],
    ) -> Callable[[Architecture], Iterator[Piece]]:
        def found(config: Architecture) -> Iterator[Piece]:
            for piece in pieces(config):
                start = max((start for start in prefixes if piece.theirs.startswith(start)), key=len)
                yield piece._replace(theirs=prefixes[start] + piece.theirs.removeprefix(start))

        return found

    instead = tuple(moved(pieces) for pieces in text.instead)
    changes = {"pieces": moved(text.pieces), "instead": instead, "nested": nested} | changes
    return replace(text, model_type=model_type, class_name=class_name, **changes)


@cache
def families() -> dict[str, Family]:
    """Every family by model_type, in the order in which one is chosen: the files of model/hf/families/."""
    found = {}
    for module in pkgutil.iter_modules(model.hf.families.__path__):
        for family in importlib.import_module(f"model.hf.families.{module.name}").FAMILIES:
            found[family.model_type] = family
    order = {name: (family.nested is not None, family.is_second, name) for name, family in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: order[name])}


def family_of(known: Mapping[str, Family], model_type: Any, where: str) -> Family:
    """The family with that name. Raises CheckpointError that lists those there are."""
    if not isinstance(model_type, str) or model_type not in known:
        hint = did_you_mean(str(model_type), known)
        raise CheckpointError(f"{where}: {model_type!r} is not one of {', '.join(known)}{hint}")
    return known[model_type]
