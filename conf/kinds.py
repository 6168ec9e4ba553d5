"""Config classes found in the files of a package, told apart by their field `kind`."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Annotated, Any, TypeVar, Union

from pydantic import Discriminator

from conf.compose import Config

T = TypeVar("T", bound=Config)


def kinds_in(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """Every concrete subclass of `base` in the files of `package`, by the default of its `kind`, sorted.

    Imports the files.
    """
    files = {f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)}
    for file in files:
        importlib.import_module(file)
    found = {
        config.model_fields["kind"].default: config
        for config in _concrete(base)
        if config.__module__ in files
    }
    return dict(sorted(found.items()))


def _concrete(base: type[T]) -> list[type[T]]:
    found = []
    for child in base.__subclasses__():
        found += _concrete(child)
        if not getattr(child, "__abstractmethods__", None):
            found.append(child)
    return found


def kind_of(config: Config) -> str:
    """The kind of a config that has one."""
    return type(config).model_fields["kind"].default


def one_of(kinds: Mapping[str, type[Config]]) -> Any:
    """The pydantic type of a node that is one of these."""
    members = tuple(kinds.values())
    union = Union[members]  # noqa: UP007 (the members are found at run time)
    return Annotated[union, Discriminator("kind")] if len(members) > 1 else union
