"""Hydra composes the groups of conf/; one typed, frozen tree comes out, or every violation at once."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from conf.errors import ConfigError, Violation
from conf.known_keys import closest_keys, did_you_mean, known_keys
from conf.tree import copied, is_referred, resolved, resolved_value, set_keys

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONF_DIR = Path(__file__).parent
# The name of the option that an architecture from elsewhere stands as.
_GIVEN = "_given"
# A value that is no list, mapping, function or several values, and not in quotes; it may hold references.
_PLAIN = re.compile(r"""(?:[^\s'"\\\[\](){},]|\$\{[^{}'"\\]*\}|[^\S\n](?=\S))+""")


class Config(BaseModel):
    """A frozen node of the config tree: every key known, no type coerced, every number finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


T = TypeVar("T", bound=Config)


def compose(overrides: Sequence[str], root: type[T]) -> T:
    """The tree that `overrides` ask for, checked against `root`.

    Overrides are `group=option` and `key=value` as typed on a command line. Fields of `root` may be
    fewer than the groups in conf/: what `root` does not name is not read.

    Raises ConfigError with all violations.
    """
    return validate(root, compose_known(overrides, root))


def compose_known(
    overrides: Sequence[str], root: type[BaseModel], model: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The composed tree cut to what `root` names and what was typed, unchecked. Raises ConfigError.

    model is as in `compose_tree`.
    """
    tree = compose_tree(overrides, model)
    typed = {key.split(".")[0] for key in typed_keys(overrides)}
    return {
        name: value
        for name, value in tree.items()
        if name in root.model_fields or (name in typed and not (CONF_DIR / name).is_dir())
    }


def compose_tree(overrides: Sequence[str], model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The composed config as plain containers, interpolations resolved, types unchecked.

    model is an architecture that stands where an option of the group `model` would, so that recipes and
    overrides change it.

    Raises ConfigError when a group, an option or the syntax of an override is unknown.
    """
    lines = hydra_overrides(overrides)
    if model is None or "model" in typed_keys(overrides):
        return _compose_lines(lines)
    with model_option(model) as given:
        return _compose_lines([*given, *lines], _compose_groups.__wrapped__)


@contextmanager
def model_option(model: Mapping[str, Any]) -> Iterator[list[str]]:
    """The lines by which Hydra takes an architecture as an option of the group `model`."""
    with TemporaryDirectory() as directory:
        layout = model.get("layout")
        rest = {name: value for name, value in model.items() if name != "layout"}
        # As a layout of its own, so that layout=... wins over it as over that of any model.
        given = {"layout": layout, "model": {"defaults": ["_self_", {"override /layout": _GIVEN}], **rest}}
        for group, tree in given.items():
            (Path(directory) / group).mkdir()
            package = "# @package _global_\n" if group == "model" else ""
            (Path(directory) / group / f"{_GIVEN}.yaml").write_text(package + json.dumps(tree))
        yield [f"hydra.searchpath=[file://{directory}]", f"model={_GIVEN}"]


def composed_value(overrides: Sequence[str], key: str) -> Any:
    """What the composed config holds under one key, references followed; None where it holds nothing.

    Values that cannot be set elsewhere do not count. Raises ConfigError as `compose_tree` does.
    """
    with _named_errors():
        tree, _ = _tree_of(hydra_overrides(overrides), _compose_groups)
        return resolved_value(tree, key)


def typed_keys(overrides: Sequence[str]) -> list[str]:
    """The key or group of each override, as Hydra reads it; those that it cannot read are left out."""
    from hydra.errors import HydraException

    keys = []
    for override in overrides:
        with suppress(HydraException):
            keys.append(_parsed(override).key_or_group)
    return keys


def typed_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The option or value of each override by its key or group; those that Hydra cannot read are left out."""
    from hydra.errors import HydraException

    values = {}
    for override in overrides:
        with suppress(HydraException):
            parsed = _parsed(override)
            values[parsed.key_or_group] = parsed.value()
    return values


Groups = Callable[[tuple[str, ...]], dict[str, Any]]


def _compose_lines(lines: Sequence[str], groups: Groups | None = None) -> dict[str, Any]:
    """Lines of `hydra_overrides` as a tree: those of groups by Hydra, then values as Hydra would set them."""
    with _named_errors():
        tree, violations = _tree_of(lines, groups or _compose_groups)
        if violations:
            raise ConfigError(violations)
        return resolved(tree)


def _tree_of(lines: Sequence[str], groups: Groups) -> tuple[dict[str, Any], list[Violation]]:
    """The tree with its references as they stand, and what could not be set in it."""
    overrides = [_parsed(line) for line in lines]
    values = [parsed for parsed in overrides if parsed.is_force_add()]
    swept = [parsed for parsed in overrides if parsed.is_sweep_override()]
    if swept:
        message = "is several values: a sweep over them needs -m, quotes make them one"
        raise ConfigError([Violation(parsed.key_or_group, message) for parsed in swept])
    # Composing groups is the slow part, and most compositions of a process differ in values only.
    tree = copied(groups(tuple(line for line in lines if not line.startswith("++"))))
    # What a reference stands for is complete before one leaf of the copy is set.
    values.sort(key=lambda parsed: is_referred(tree, parsed.key_or_group))
    return tree, set_keys(tree, [(parsed.key_or_group, parsed.value()) for parsed in values])


@contextmanager
def _named_errors() -> Iterator[None]:
    """Errors of Hydra and OmegaConf as ConfigError."""
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:
        key, said = getattr(error, "full_key", None) or "config", _first_line(error)
        if isinstance(error, InterpolationKeyError):
            said += "; a variable of the environment is ${oc.env:NAME}"
        raise ConfigError([Violation(str(key), said)]) from error
    except HydraException as error:
        raise ConfigError([Violation("config", _first_line(error))]) from error


@cache
def _parsed(line: str) -> "Override":
    """One override as Hydra reads it. Raises HydraException."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(readable(line))


def readable(override: str) -> str:
    """The override, its value in quotes where it is a plain one with letters that Hydra reads only there."""
    key, sign, value = override.partition("=")
    is_plain = _PLAIN.fullmatch(value) is not None
    return override if value.isascii() or not is_plain else f"{key}{sign}'{value}'"


@cache
def _compose_groups(lines: tuple[str, ...]) -> dict[str, Any]:
    """The groups as plain containers, references as they stand. Not to be mutated."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        tree = OmegaConf.to_container(hydra_compose("config", overrides=list(lines)))
    assert isinstance(tree, dict), f"{type(tree)=}"
    return {str(name): value for name, value in tree.items()}


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides in the form in which Hydra never rejects a value key: validation names the typos.

    Every mixer of conf/mixer/ is composed, so that any layout can name it. Raises ConfigError for
    bad syntax and for an option that its group does not have.
    """
    from hydra.errors import HydraException

    lines, violations = [], []
    for override in overrides:
        try:
            parsed = _parsed(override)
        except HydraException as error:
            violations.append(Violation(override, f"not a key=value override: {_first_line(error)}"))
            continue
        key = parsed.key_or_group
        is_group = "." not in key and (CONF_DIR / key).is_dir()
        if is_group and parsed.is_delete():
            options = ", ".join(group_options(key))
            violations.append(Violation(override, f"a group has one of its options; choose from {options}"))
        elif key.startswith("hydra") or parsed.is_delete():
            lines.append(override)
        elif is_group:
            violations += _unknown_options(key, _swept_options(parsed))
            lines.append(override.lstrip("+"))
        else:
            lines.append("++" + readable(override.lstrip("+")))
    if violations:
        raise ConfigError(violations)
    mixers = ",".join(group_options("mixer"))
    return [f"mixer=[{mixers}]", *lines]


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a sweep: every combination of the values that they give.

    Raises ConfigError for bad syntax and for an interval, which has no list of values.
    """
    from hydra.errors import HydraException

    choices, violations = list[list[str]](), []
    for override in overrides:
        try:
            parsed = _parsed(override)
            choices.append(_choices(override, parsed))
        except HydraException as error:
            hint = "give values with commas, key=1,2"
            violations.append(
                Violation(override, f"not an override of a sweep: {_first_line(error)}; {hint}")
            )
    if violations:
        raise ConfigError(violations)
    return [list(chosen) for chosen in product(*choices)]


def _choices(override: str, parsed: "Override") -> list[str]:
    from hydra.core.override_parser.types import Glob

    if not parsed.is_sweep_override():
        return [override]
    value = parsed.value()
    if isinstance(value, Glob):
        return [f"{parsed.key_or_group}={name}" for name in value.filter(group_options(parsed.key_or_group))]
    return [f"{parsed.get_key_element()}={text}" for text in parsed.sweep_string_iterator()]


def overrides_of(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A plain tree as the overrides that give it."""
    found = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found += overrides_of(value, f"{key}.")
        else:
            # JSON is what Hydra's grammar reads, but for quotes within a string, which it escapes otherwise.
            found.append(f"{key}={json.dumps(value)}")
    return found


def group_options(group: str) -> list[str]:
    """Names of the options of a config group, sorted."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def _swept_options(parsed: "Override") -> Any:
    """The options that an override names: those that a sweep tries one after the other, else its value."""
    from hydra.core.override_parser.types import ChoiceSweep

    value = parsed.value()
    if isinstance(value, ChoiceSweep):
        return list(value.list)
    # A pattern picks among the options that there are.
    return [] if parsed.is_sweep_override() else value


def _unknown_options(group: str, value: Any) -> list[Violation]:
    options = group_options(group)
    chosen = value if isinstance(value, list) else [value]
    unknown = ["null" if option is None else str(option) for option in chosen if str(option) not in options]
    return [
        Violation(group, f"{option!r} is not one of {', '.join(options)}{did_you_mean(option, options)}")
        for option in unknown
    ]


def validate(root: type[T], tree: Mapping[str, Any]) -> T:
    """`tree` as a `root`. Raises ConfigError that lists every field that does not fit."""
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        known = list(known_keys(root, tree))
        found = [_violation(detail, known, tree) for detail in error.errors(include_url=False)]
        raise ConfigError(list(dict.fromkeys(found))) from error


def parse_command(arguments: Sequence[str], root: type[T]) -> T:
    """`key=value` arguments of a small command as a `root`. Raises ConfigError."""
    return validate(root, dict(parse_values(arguments)))


def parse_values(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Keys and values of `key=value` arguments. Raises ConfigError for what is none."""
    from hydra.errors import HydraException

    values = []
    for argument in arguments:
        try:
            parsed = _parsed(argument)
        except HydraException as error:
            message = f"not a key=value argument: {_first_line(error)}"
            raise ConfigError([Violation(argument, message)]) from error
        values.append((parsed.key_or_group, parsed.value()))
    return values


def _violation(detail: ErrorDetails, known: Sequence[str], tree: Mapping[str, Any]) -> Violation:
    parts = _without_tags([str(part) for part in detail["loc"]], tree, is_missing=detail["type"] == "missing")
    key = ".".join(parts)
    if detail["type"] == "extra_forbidden":
        return Violation(key, f"unknown key{closest_keys(key, known)}")
    if detail["type"] == "missing":
        return Violation(key, "missing; give it a value")
    if detail["type"] == "union_tag_invalid":
        context = detail.get("ctx", {})
        legal, tag = [name.strip("'") for name in context["expected_tags"].split(", ")], context["tag"]
        message = f"{tag!r} is not one of {', '.join(legal)}{did_you_mean(tag, legal)}"
        return Violation(f"{key}.{context['discriminator'].strip(chr(39))}", message)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # A check across the fields of a node says all itself; at the root it names the key as well.
        if not key:
            key, _, message = message.partition(": ")
        return Violation(key, message)
    return Violation(key, f"{message[0].lower()}{message[1:]}; found {_shown(detail['input'])}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _without_tags(parts: Sequence[str], tree: Mapping[str, Any], *, is_missing: bool) -> list[str]:
    # A tagged union puts its tag into the path, where the user typed no key.
    kept, node = [], tree
    for index, part in enumerate(parts):
        is_absent = isinstance(node, Mapping) and part not in node
        if is_absent and not (is_missing and index == len(parts) - 1):
            continue
        kept.append(part)
        node = node.get(part) if isinstance(node, Mapping) else None
    return kept


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
