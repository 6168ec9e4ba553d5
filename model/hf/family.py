"""What each family of published checkpoints is: its config and its tensors, both ways."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import model.hf.families
from conf.compose import did_you_mean
from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.fields import Fields, shown
from model.hf.pieces import Piece


def _nothing(_: Any) -> list[str]:
    return []


def _no_fields(_: Architecture) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One model_type. A file of model/hf/families/ lists its families as FAMILIES.

    pairs: fields of config.json and the keys of ours that hold the same value; a field with a default, the
    pair (key, default), may be absent. fixed: overrides that all members share. expects: fields with the only
    values that we build. read_more, write_more: what is not a plain value. pieces: where the tensors stand.
    aliases: other names of fields, to the names in pairs.
    ignored: patterns of tensors that carry nothing of the model, such as buffers that follow from the config.
    prediction: the pattern of the tensors of modules that predict ahead; transformers drops these, and a
    directory without them loads without them.
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
    prediction: str | None = None

    def read(self, fields: Fields) -> list[str]:
        """Overrides for our config groups. Raises CheckpointError for fields that we cannot build."""
        found = list(self.fixed)
        for name, key in self.pairs.items():
            key, default = (key, ()) if isinstance(key, str) else (key[0], key[1:])
            found.append(f"{key}={shown(fields.take(name, *default))}")
        for name, allowed in self.expects.items():
            fields.expect(name, *allowed)
        return [*found, *self.read_more(fields)]

    def write(self, config: Architecture) -> dict[str, Any]:
        """Fields of a config.json. Raises CheckpointError for an architecture of another family."""
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


@cache
def families() -> dict[str, Family]:
    """Every family by model_type: the files of model/hf/families/."""
    found = {}
    for module in pkgutil.iter_modules(model.hf.families.__path__):
        for family in importlib.import_module(f"model.hf.families.{module.name}").FAMILIES:
            found[family.model_type] = family
    return dict(sorted(found.items()))


def family_of(model_type: Any, path: str) -> Family:
    """The family with that name. Raises CheckpointError that lists those there are."""
    if not isinstance(model_type, str) or model_type not in families():
        hint = did_you_mean(str(model_type), families())
        known = ", ".join(families())
        raise CheckpointError(f"{path}: model_type {model_type!r} is not one of {known}{hint}")
    return families()[model_type]
