"""A composed config as plain containers: keys are set as OmegaConf would set them, references followed."""

import re
from collections.abc import Iterable
from typing import Any

from conf.errors import Violation

_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_MISSING = "???"
# References that are followed one after the other.
_LONGEST = 100


def copied(node: Any) -> Any:
    """Containers are new, values the same."""
    if isinstance(node, dict):
        return {name: copied(value) for name, value in node.items()}
    return [copied(value) for value in node] if isinstance(node, list) else node


def parent_of(tree: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds a dotted key, None where the tree has no such group, and the key's last name."""
    *way, last = key.split(".")
    node: Any = tree
    for name in way:
        node = _below(node, name)
    return (node if isinstance(node, dict) else None), last


def is_referred(tree: dict[str, Any], key: str) -> bool:
    """Whether the key lies within a mapping that is a reference to another one."""
    node: Any = tree
    for name in key.split(".")[:-1]:
        node = _below(node, name)
        if _mapping_behind(node, tree) is not None:
            return True
    return False


def set_keys(tree: dict[str, Any], values: Iterable[tuple[str, Any]]) -> list[Violation]:
    """Sets dotted keys one after the other, and merges a mapping into a mapping. Mutates tree.

    A reference to a mapping on the way becomes a copy of it, so that only the copy changes. Gives what could
    not be set: each index that a list does not have, and each mapping that would become something else than
    null.
    """
    violations = []
    for key, value in values:
        try:
            _set(tree, key, value)
        except LookupError as error:
            violations.append(Violation(key, error.args[0]))
    return violations


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *way, last = key.split(".")
    node: Any = tree
    for name in way:
        _open(node, name, tree)
        if not isinstance(_below(node, name), dict | list):
            _put(node, name, {})
        node = _below(node, name)
    _merge(node, last, value, tree)


def resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with every reference replaced by what it leads to.

    Raises OmegaConfBaseException for what is missing or refers to nothing.
    """
    try:
        return _resolved(tree, tree)
    except (LookupError, RecursionError):
        from omegaconf import OmegaConf

        # Missing, wrong, or more than a reference to a key: the grammar of OmegaConf, which is slow.
        slow = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
        assert isinstance(slow, dict), f"{type(slow)=}"
        return {str(name): value for name, value in slow.items()}


def resolved_value(tree: dict[str, Any], key: str) -> Any:
    """What stands under a dotted key, every reference in it followed; None where nothing does.

    Raises OmegaConfBaseException for what refers to nothing.
    """
    node: Any = tree
    for name in key.split("."):
        node = _below(node, name)
        node = _mapping_behind(node, tree) or node
    try:
        return _resolved(node, tree)
    except (LookupError, RecursionError):
        from omegaconf import OmegaConf

        return OmegaConf.select(OmegaConf.create(tree), key)


def _resolved(node: Any, tree: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return {name: _resolved(value, tree) for name, value in node.items()}
    if isinstance(node, list):
        return [_resolved(value, tree) for value in node]
    if not isinstance(node, str) or ("${" not in node and node != _MISSING):
        return node
    if _REFERENCE.fullmatch(node):
        return _resolved(_referred(node, tree), tree)
    return _with_text(node, tree)


def _with_text(text: str, tree: dict[str, Any]) -> str:
    """A text that holds references, as OmegaConf writes it. Raises LookupError for all but plain ones."""
    filled = _REFERENCE.sub(lambda match: str(_plain(_resolved(match[0], tree))), text)
    if "$" in filled or "\\" in text:
        raise LookupError(text)
    return filled


def _plain(value: Any) -> int | str:
    """A value whose text is the same everywhere. Raises LookupError for any other."""
    if isinstance(value, str) or type(value) is int:
        return value
    raise LookupError(value)


def _referred(reference: str, tree: dict[str, Any]) -> Any:
    """What stands where ${a.b} leads. Raises LookupError for anything else, and where nothing does."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise LookupError(reference)
    found: Any = tree
    for name in match[1].split("."):
        if not isinstance(found, dict):
            raise LookupError(reference)
        found = found[name]
    return found


def _mapping_behind(value: Any, tree: dict[str, Any]) -> dict[str, Any] | None:
    """The mapping that a reference leads to, through other references; None for anything else."""
    found = value
    try:
        for _ in range(_LONGEST):
            if not isinstance(found, str):
                break
            found = _referred(found, tree)
    except LookupError:
        return None
    return found if isinstance(found, dict) and isinstance(value, str) else None


def _merge(node: Any, name: str, value: Any, tree: dict[str, Any]) -> None:
    if isinstance(value, dict):
        _open(node, name, tree)
    below = _below(node, name)
    if not isinstance(below, dict) or value is None or _mapping_behind(value, tree) is not None:
        _put(node, name, copied(value))
    elif isinstance(value, dict):
        for key, part in value.items():
            _merge(below, key, part, tree)
    else:
        raise LookupError(f"has keys of its own, {', '.join(map(str, below))}; found {value!r}")


def _open(node: Any, name: str, tree: dict[str, Any]) -> None:
    """Replaces a reference to a mapping by a copy of it. Mutates node."""
    if (target := _mapping_behind(_below(node, name), tree)) is not None:
        _put(node, name, copied(target))


def _below(node: Any, name: str) -> Any:
    """What stands under a key of a mapping or an index of a list; None where nothing does."""
    if isinstance(node, list):
        return node[int(name)] if name.isdecimal() and int(name) < len(node) else None
    return node.get(name) if isinstance(node, dict) else None


def _put(node: Any, name: str, value: Any) -> None:
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise LookupError(f"no item {name} in a list of {len(node)}")
        node[int(name)] = value
    else:
        node[name] = value
