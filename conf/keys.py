"""What stands in the yaml files of conf/: groups, their options, and each key with its value and comment.

A comment at the start of a file says what the file is. That of a key stands behind it or right above it.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from conf.groups import CONF_DIR, group_options, groups, option_files

# Parts of config.yaml that are Hydra's own.
_HYDRA = ("defaults", "hydra")
_PACKAGE = re.compile(r"# @package (\S+)")
_GLOBAL = "_global_"
_MAIN = CONF_DIR / "config.yaml"


class Key(NamedTuple):
    """A key by its full name, its value as it stands in the file, None for a node above others."""

    name: str
    value: str | None
    comment: str


class Option(NamedTuple):
    """An option of a group: what its file says of itself, and the keys that it sets."""

    name: str
    about: str
    keys: tuple[Key, ...]


def sections() -> list[str]:
    """Every group, and every other part of the config at its top, sorted."""
    own = {key.name.split(".")[0] for key in file_keys(_MAIN)}
    return sorted({*groups(), *own})


def option(group: str, path: Path) -> Option:
    """The option in a file; its keys are those of the section that is named as the group.

    Where options set keys anywhere, only the default's are read: the others set the same ones.
    """
    is_read = not is_spread(group) or path.stem == default_option(group)
    keys = file_keys(path) if is_read else ()
    return Option(path.stem, _about(path), tuple(key for key in keys if _lies_in(key.name, group)))


def options(group: str, directories: Sequence[Path] = ()) -> list[Option]:
    """All options of a group, also those in further directories: the default first, the others sorted."""
    default, files = default_option(group), option_files(group, directories)
    return [option(group, files[name]) for name in sorted(files, key=lambda name: (name != default, name))]


@cache
def default_option(group: str) -> str | None:
    """The option that config.yaml names; None where it names none, or several."""
    defaults = yaml.safe_load(_MAIN.read_text())["defaults"]
    named = {name: value for entry in defaults if isinstance(entry, dict) for name, value in entry.items()}
    found = named.get(group)
    return found if isinstance(found, str) else None


def is_spread(group: str) -> bool:
    """Whether the options of a group set keys anywhere, as models and recipes do."""
    path = CONF_DIR / group / f"{group_options(group)[0]}.yaml"
    return _package(path, path.read_text()) == ""


def shared_keys(section: str) -> tuple[Key, ...]:
    """The keys of a section that config.yaml sets, whatever option is chosen."""
    return tuple(key for key in file_keys(_MAIN) if _lies_in(key.name, section))


def _lies_in(name: str, section: str) -> bool:
    return name == section or name.startswith(f"{section}.")


def _about(path: Path) -> str:
    """What a file says of itself."""
    lines = path.read_text().splitlines()
    return _joined([line for line in lines[: _head(lines)] if not _PACKAGE.match(line)])


@cache
def file_keys(path: Path) -> tuple[Key, ...]:
    """The keys that a file of options sets; none where it holds no mapping."""
    text = path.read_text()
    lines = text.splitlines()
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(tree, yaml.MappingNode):
        return ()
    return tuple(_keys(tree, _package(path, text), lines, _head(lines)))


def _head(lines: Sequence[str]) -> int:
    """How many lines at the start of a file are its own comment."""
    return next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _package(path: Path, text: str) -> str:
    """The section that the keys of a file belong to, with a dot behind it; nothing for the whole config."""
    match = _PACKAGE.match(text)
    package = match[1] if match else "" if path == _MAIN else path.parent.name
    return "" if package in ("", _GLOBAL) else f"{package}."


def _keys(node: yaml.MappingNode, prefix: str, lines: Sequence[str], head: int) -> Iterator[Key]:
    for name, value in node.value:
        if prefix == "" and name.value in _HYDRA:
            continue
        full, line = f"{prefix}{name.value}", name.start_mark.line
        is_inner = isinstance(value, yaml.MappingNode) and not value.flow_style
        end = name.end_mark if is_inner else value.end_mark
        behind = lines[end.line][end.column :].partition("#")[2].strip()
        comment = " ".join(part for part in (_above(lines, line, head), behind) if part)
        if is_inner:
            yield Key(full, None, comment)
            yield from _keys(value, f"{full}.", lines, head)
        else:
            start = value.start_mark
            yield Key(full, lines[start.line][start.column : end.column], comment)


def _above(lines: Sequence[str], line: int, head: int) -> str:
    """The comment lines right above a line, without those at the start of the file."""
    first = line
    while first > head and lines[first - 1].strip().startswith("#"):
        first -= 1
    return _joined(lines[first:line])


def _joined(lines: Sequence[str]) -> str:
    return " ".join(line.strip().lstrip("#").strip() for line in lines)
