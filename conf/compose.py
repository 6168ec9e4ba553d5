"""Hydra composes the groups of conf/; one typed, frozen tree comes out, or every violation at once."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from conf.errors import ConfigError, Violation
from conf.groups import CONF_DIR, group_options, is_group, option_files
from conf.keys import file_keys, sections
from conf.known_keys import FLAT, ONE_NAME, closest_keys, known_keys
from conf.names import listed
from conf.overrides import first_line, parsed_override, readable
from conf.tree import copied, is_referred, parent_of, resolved, resolved_value, set_keys
from conf.user_files import ARCHITECTURE, Given, UserFile, check_options, read_given

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# The name of the option that an architecture from elsewhere stands as.
_GIVEN = "_given"
# The group and option that values of a user's file stand as where Hydra alone composes.
VALUES = "_values"


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
    given = read_given(overrides)
    with given.naming_file():
        return validate(root, compose_known(given, root))


def compose_known(
    given: Given,
    root: type[BaseModel],
    model: Mapping[str, Any] | None = None,
    beneath: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The composed tree cut to what `root` names and what was typed, unchecked. Raises ConfigError.

    model and beneath are as in `compose_given`.
    """
    tree = compose_given(given, model, beneath)
    typed = {key.split(".")[0] for key in given.typed_keys()}
    # A file has the whole config, also for a command that reads a part of it.
    unknown = {key.split(".")[0] for key in given.all_keys() if given.file is not None} - {*sections()}
    return {
        name: value
        for name, value in tree.items()
        if name in root.model_fields or (name in typed | unknown and not is_group(name))
    }


def compose_tree(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed config as plain containers, interpolations resolved, types unchecked.

    Raises ConfigError when a group, an option or the syntax of an override is unknown.
    """
    return compose_given(read_given(overrides))


def compose_given(
    given: Given, model: Mapping[str, Any] | None = None, beneath: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """As `compose_tree`, of overrides with the files that stand beneath them.

    model is an architecture that stands where an option of the group `model` would, so that recipes and
    overrides change it. beneath has values of dotted keys that stand in place of those of any group.
    """
    if model is None or "model" in given.all_keys():
        return _composed(given, beneath=beneath)
    with model_option(model) as (directory, line):
        return _composed(given, (directory,), (line,), beneath)


def _composed(
    given: Given,
    directories: Sequence[Path] = (),
    lines: Sequence[str] = (),
    beneath: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    with _named_errors(given):
        tree, violations = _tree_of(given, directories, lines, beneath)
        if violations:
            raise ConfigError(violations)
        return resolved(tree)


@contextmanager
def model_option(model: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """The directory and the line by which Hydra takes an architecture as an option of the group `model`."""
    with TemporaryDirectory() as directory:
        layout = model.get("layout")
        rest = {name: value for name, value in model.items() if name != "layout"}
        # As a layout of its own, so that layout=... wins over it as over that of any model.
        given = {"layout": layout, "model": {"defaults": ["_self_", {"override /layout": _GIVEN}], **rest}}
        for group, tree in given.items():
            (Path(directory) / group).mkdir()
            package = "# @package _global_\n" if group == "model" else ""
            (Path(directory) / group / f"{_GIVEN}.yaml").write_text(package + json.dumps(tree))
        yield Path(directory), f"model={_GIVEN}"


@contextmanager
def values_option(file: UserFile) -> Iterator[tuple[Path, str]]:
    """The directory and the line by which Hydra takes the values of a file after every group."""
    with TemporaryDirectory() as directory:
        (Path(directory) / VALUES).mkdir()
        text = "# @package _global_\n" + json.dumps(file.values)
        (Path(directory) / VALUES / f"{_GIVEN}.yaml").write_text(text)
        yield Path(directory), f"+{VALUES}={_GIVEN}"


def composed_value(given: Given, key: str) -> Any:
    """What the composed config holds under one key, references followed; None where it holds nothing.

    Values that cannot be set elsewhere do not count. Raises ConfigError as `compose_tree` does.
    """
    with _named_errors(given):
        tree, _ = _tree_of(given)
        return resolved_value(tree, key)


def _tree_of(
    given: Given,
    directories: Sequence[Path] = (),
    lines: Sequence[str] = (),
    beneath: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[Violation]]:
    """The tree with its references as they stand, and what could not be set in it.

    It is that of the groups by Hydra, then `beneath`, then what stands in the file, then values as Hydra
    would set them. directories and lines are more of both, before those that are given.
    """
    typed = hydra_lines(given)
    overrides = [parsed_override(line) for line in typed]
    values = [parsed for parsed in overrides if parsed.is_force_add()]
    swept = [parsed for parsed in overrides if parsed.is_sweep_override()]
    if swept:
        message = "is several values: a sweep over them needs -m, quotes make them one"
        raise ConfigError([Violation(parsed.key_or_group, message) for parsed in swept])
    chosen = tuple(line for line in typed if not line.startswith("++"))
    found = given.search_lines(directories)
    # Composing groups is the slow part, and most compositions of a process differ in values only.
    groups = _compose_groups if not directories else _compose_groups.__wrapped__
    tree = copied(groups((*found, *lines, *chosen), _state_of(given.directories)))
    for key, value in (beneath or {}).items():
        parent, name = parent_of(tree, key)
        if parent is not None:
            parent[name] = copied(value)
    violations = [] if given.file is None else _set_file(tree, given.file, _replaced(given, lines))
    # What a reference stands for is complete before one leaf of the copy is set.
    values.sort(key=lambda parsed: is_referred(tree, parsed.key_or_group))
    return tree, violations + set_keys(tree, [(parsed.key_or_group, parsed.value()) for parsed in values])


def _set_file(tree: dict[str, Any], file: UserFile, replaced: Collection[str]) -> list[Violation]:
    """Sets what stands in the file; of a whole config all but `replaced` sections. Mutates tree.

    Gives what could not be set.
    """
    if not file.is_whole:
        leaves = sorted(file.leaves(), key=lambda leaf: is_referred(tree, leaf[0]))
        return set_keys(tree, leaves)
    for name, section in file.values.items():
        if name == "mixer" and isinstance(section, dict) and name not in replaced:
            # Also mixers that are newer than the file, which a layout may name now.
            tree[name] |= copied(section)
        elif name not in replaced:
            tree[name] = copied(section)
    return []


def _replaced(given: Given, lines: Sequence[str]) -> set[str]:
    """The sections that typed groups, or weights that are typed, set anew in a whole config."""
    typed = given.typed_keys()
    found = {key for key in typed if is_group(key)}
    if "model" in found or ("train.start" in typed and lines):
        found |= set(ARCHITECTURE)
    return found


@contextmanager
def _named_errors(given: Given) -> Iterator[None]:
    """Errors of Hydra, OmegaConf and YAML as ConfigError; the files of the user's own are looked at first."""
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except ConfigError:
        raise
    except (OmegaConfBaseException, HydraException, YAMLError, UnicodeDecodeError) as error:
        check_options(given.directories)
        if isinstance(error, HydraException):
            raise ConfigError([Violation("config", first_line(error))]) from error
        if not isinstance(error, OmegaConfBaseException):
            raise
        key, said = error.full_key or "config", first_line(error)
        if isinstance(error, InterpolationKeyError):
            said += "; a variable of the environment is ${oc.env:NAME}"
        raise ConfigError([Violation(str(key), said)]) from error


@cache
def _compose_groups(lines: tuple[str, ...], state: tuple[Any, ...]) -> dict[str, Any]:
    """The groups as plain containers, references as they stand. Not to be mutated.

    state is that of the files of the user's own: other files are composed anew.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        tree = OmegaConf.to_container(hydra_compose("config", overrides=list(lines)))
    assert isinstance(tree, dict), f"{type(tree)=}"
    return {str(name): value for name, value in tree.items()}


def _state_of(directories: Sequence[Path]) -> tuple[Any, ...]:
    """What changes where a file of options in the directories does."""
    files = (path for directory in directories for path in sorted(directory.glob("*/*.yaml")))
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path in files for stat in [path.stat()])


def hydra_lines(given: Given) -> list[str]:
    """Overrides in the form in which Hydra never rejects a value key: validation names the typos.

    Every mixer of conf/mixer/ is composed, so that any layout can name it; the file's groups come before what
    is typed. Raises ConfigError for bad syntax and for an option that its group does not have.
    """
    from hydra.errors import HydraException

    lines, violations = [], []
    for group, option in (given.file.choices if given.file is not None else {}).items():
        violations += _unknown_options(group, option, given)
        lines.append(f"{group}={json.dumps(option)}")
    for override in given.overrides:
        try:
            parsed = parsed_override(override)
        except HydraException as error:
            violations.append(Violation(override, f"not a key=value override: {first_line(error)}"))
            continue
        key = parsed.key_or_group
        if is_group(key) and parsed.is_delete():
            options = listed(group_options(key, given.directories), key)
            violations.append(Violation(override, f"a group has one of its options; choose from {options}"))
        elif key.startswith("hydra") or parsed.is_delete():
            lines.append(override)
        elif is_group(key):
            violations += _unknown_options(key, _swept_options(parsed), given)
            lines.append(override.lstrip("+"))
        else:
            lines.append("++" + readable(override.lstrip("+")))
    if violations:
        raise ConfigError(violations)
    mixers = ",".join(group_options("mixer", given.directories))
    return [f"mixer=[{mixers}]", *lines]


def _swept_options(parsed: "Override") -> Any:
    """The options that an override names: those that a sweep tries one after the other, else its value."""
    from hydra.core.override_parser.types import ChoiceSweep

    value = parsed.value()
    if isinstance(value, ChoiceSweep):
        return list(value.list)
    # A pattern picks among the options that there are.
    return [] if parsed.is_sweep_override() else value


def _unknown_options(group: str, value: Any, given: Given) -> list[Violation]:
    options = group_options(group, given.directories)
    chosen = value if isinstance(value, list) else [value]
    unknown = ["null" if option is None else str(option) for option in chosen if str(option) not in options]
    return [
        Violation(group, f"{option!r} is not one of {listed(options, group, near=option)}")
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


def valid_parts(root: type[T], tree: Mapping[str, Any]) -> T:
    """The parts of `tree` that are right by themselves, keys that are not known left out; no check across."""
    found = {}
    for name, field in root.model_fields.items():
        if name not in tree:
            continue
        annotation: Any = field.annotation
        adapter, part = TypeAdapter(annotation), copied(tree[name])
        try:
            found[name] = adapter.validate_python(part)
        except ValidationError as error:
            extra = [detail["loc"] for detail in error.errors() if detail["type"] == "extra_forbidden"]
            for way in extra:
                _drop(part, way)
            with suppress(ValidationError):
                found[name] = adapter.validate_python(part)
    return root.model_construct(**found)


def _drop(node: Any, way: Sequence[str | int]) -> None:
    """Takes a key out of a plain tree; tags of unions on the way are no keys. Mutates node."""
    for name in way[:-1]:
        node = node[name] if isinstance(node, dict) and name in node else node
    if isinstance(node, dict):
        node.pop(way[-1], None)


def parse_command(arguments: Sequence[str], root: type[T]) -> T:
    """`key=value` arguments of a small command as a `root`. Raises ConfigError."""
    return validate(root, dict(parse_values(arguments)))


def parse_values(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Keys and values of `key=value` arguments. Raises ConfigError for what is none."""
    from hydra.errors import HydraException

    values = []
    for argument in arguments:
        try:
            parsed = parsed_override(argument)
        except HydraException as error:
            message = f"not a key=value argument: {first_line(error)}"
            raise ConfigError([Violation(argument, message)]) from error
        values.append((parsed.key_or_group, parsed.value()))
    return values


def _violation(detail: ErrorDetails, known: Sequence[str], tree: Mapping[str, Any]) -> Violation:
    parts = _without_tags([str(part) for part in detail["loc"]], tree, is_missing=detail["type"] == "missing")
    key = ".".join(parts)
    if detail["type"] == "extra_forbidden":
        return Violation(key, unknown_key(key, known, is_one_name="." in parts[-1]))
    if detail["type"] == "missing":
        return Violation(key, "missing; give it a value")
    if detail["type"] == "union_tag_invalid":
        context = detail.get("ctx", {})
        legal, tag = [name.strip("'") for name in context["expected_tags"].split(", ")], context["tag"]
        message = f"{tag!r} is not one of {listed(legal, parts[0], near=tag)}"
        return Violation(f"{key}.{context['discriminator'].strip(chr(39))}", message)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # A check across the fields of a node says all itself; at the root it names the key as well.
        if not key:
            key, _, message = message.partition(": ")
        return Violation(key, message)
    return Violation(key, f"{message[0].lower()}{message[1:]}; found {_shown(detail['input'])}")


def unknown_key(key: str, known: Sequence[str], *, is_one_name: bool = False) -> str:
    """What to say of a key that is not known: options of its group that have it, else keys that are close.

    is_one_name: it holds dots that stood in YAML.
    """
    if is_one_name and key in known:
        return f"unknown key; {ONE_NAME}"
    group, _, rest = key.partition(".")
    if is_group(group) and rest.split(".")[0] in sections():
        return f"unknown key; {FLAT}"
    if "." not in key or not is_group(group) or group == "mixer":
        return f"unknown key{closest_keys(key, known)}"
    has = [name for name, path in option_files(group).items() if _sets(path, key)]
    if not has:
        return f"unknown key{closest_keys(key, known)}"
    options = listed([f"{group}={name}" for name in sorted(has)], group)
    return f"no key of the {group} that is chosen; {options} {'has' if len(has) == 1 else 'have'} it"


def _sets(path: Path, key: str) -> bool:
    return any(found.name == key for found in file_keys(path))


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
