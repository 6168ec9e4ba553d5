"""Files of YAML and JSON that a user wrote: what they hold, or one line that says where they are wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, Violation
from conf.known_keys import did_you_mean
from conf.overrides import first_line


def read_json(path: Path, key: str) -> dict[str, Any]:
    """The object in a file. Raises ConfigError on `key`."""
    try:
        found = json.loads(read_text(path, key))
    except ValueError as error:
        raise ConfigError([Violation(key, f"{path}: no JSON: {error}")]) from error
    if not isinstance(found, dict):
        message = f"{path}: found a {type(found).__name__}; the config of a run is an object"
        raise ConfigError([Violation(key, message)])
    return found


def read_yaml(path: Path, key: str) -> dict[Any, Any]:
    """What a file of ours or of a user's holds, references not followed. Raises ConfigError on `key`."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = read_text(path, key)
    try:
        # The YAML of Hydra: 3e-4 is a number, and no key stands twice.
        tree = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark is not None else str(path)
        raise ConfigError([Violation(key, f"{where}: no YAML: {_problem(error)}")]) from error
    except yaml.YAMLError as error:
        raise ConfigError([Violation(key, f"{path}: no YAML: {first_line(error)}")]) from error
    except OmegaConfBaseException as error:
        said = f"{path}: {error.full_key or 'a value'}: {first_line(error)}; a dollar sign begins ${{KEY}}"
        raise ConfigError([Violation(key, said)]) from error
    found = OmegaConf.to_container(tree)
    if not isinstance(found, dict) or _is_a_word(text, found):
        raise ConfigError([Violation(key, f"{path}: holds no keys; write KEY: VALUE on a line each")])
    return found


def read_text(path: Path, key: str) -> str:
    """The text of a file. Raises ConfigError on `key`."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        message = f"{path}: no text in UTF-8 (byte {error.start}); save it as UTF-8"
        raise ConfigError([Violation(key, message)]) from error
    except FileNotFoundError as error:
        near = did_you_mean(path.name, _names_in(path.parent))
        raise ConfigError([Violation(key, f"{path}: no such file{near}")]) from error
    except OSError as error:
        raise ConfigError([Violation(key, f"{path}: cannot read: {error.strerror}")]) from error


def _names_in(directory: Path) -> list[str]:
    try:
        return [path.name for path in directory.iterdir()]
    except OSError:
        return []


def _is_a_word(text: str, found: Mapping[Any, Any]) -> bool:
    # OmegaConf reads a lone word as a key without a value.
    return list(found.values()) == [None] and ":" not in text


def _problem(error: Any) -> str:
    said = ", ".join(part.strip() for part in (error.context, error.problem) if part)
    return " ".join(said.split())
