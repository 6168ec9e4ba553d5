"""Configs of a user's own outside of conf/: one file beside the overrides, and directories of options.

`config=FILE.yaml` names groups under `defaults:` and values of keys; what is typed wins over both.
`config=FILE.json` is the whole config of a run. `--config-dir DIR`, Hydra's `hydra.searchpath`, adds the
options DIR/GROUP/NAME.yaml.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, Violation
from conf.groups import CONF_DIR, groups, is_group, option_files
from conf.keys import file_keys, sections
from conf.known_keys import FLAT, ONE_NAME, did_you_mean
from conf.names import shortened
from conf.overrides import parsed_override, quoted
from conf.reading import read_json, read_yaml

FILE_KEY = "config"
SEARCH_KEY = "hydra.searchpath"
DIRECTORY_FLAG = "--config-dir"
# The parts of a config that an option of the group `model` sets together.
ARCHITECTURE = ("model", "layout", "mixer", "moe", "residual")
_SCHEME = "file://"


@dataclass(frozen=True)
class UserFile:
    """A file that stands beside overrides: its path as typed, options of groups, and values.

    is_whole: its values are those of every key of a run.
    """

    path: str
    choices: Mapping[str, str | list[str] | None]
    values: Mapping[str, Any]
    is_whole: bool = False

    def leaves(self) -> list[tuple[str, Any]]:
        """The values by their dotted keys. A mapping with names that hold dots is one of them."""
        return list(_leaves(self.values))

    def all_keys(self) -> list[str]:
        """What it would be to type it: groups and keys."""
        return [*self.choices, *(key for key, _ in self.leaves())]


@dataclass(frozen=True)
class Given:
    """What a command is given: overrides as typed, and files of the user's own beneath them."""

    overrides: tuple[str, ...]
    file: UserFile | None = None
    directories: tuple[Path, ...] = field(default=())

    def typed_keys(self) -> list[str]:
        """The key or group of each override, as Hydra reads it; those that it cannot read are left out."""
        return [key for key in map(_key, self.overrides) if key is not None]

    def all_keys(self) -> list[str]:
        """What is typed and what stands in the file."""
        return [*(self.file.all_keys() if self.file is not None else ()), *self.typed_keys()]

    def all_values(self) -> dict[str, Any]:
        """The option or value of all that is typed or stands in the file, by its key or group."""
        found: dict[str, Any] = {} if self.file is None else {**self.file.choices, **dict(self.file.leaves())}
        for override in self.overrides:
            if (key := _key(override)) is not None:
                found[key] = parsed_override(override).value()
        return found

    def search_lines(self, more: Sequence[Path] = ()) -> list[str]:
        """The line by which Hydra finds the directories, `more` before all; none without any."""
        found = [quoted(f"{_SCHEME}{directory}") for directory in (*more, *self.directories)]
        return [f"{SEARCH_KEY}=[{','.join(found)}]"] if found else []

    @contextmanager
    def naming_file(self) -> Iterator[None]:
        """Violations of the block name the file where what they are about stands there and is not typed."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError([self._named(violation) for violation in error.violations]) from error

    def _named(self, violation: Violation) -> Violation:
        key = violation.key
        if key in self.typed_keys() and not is_group(key):
            return violation
        where = self._option_with(key)
        if self.file is not None and where is None:
            keys = self.file.all_keys()
            where = self.file.path if any(_is_within(key, k) or _is_within(k, key) for k in keys) else None
        return violation if where is None else Violation(key, f"{violation.message} (in {where})")

    def _option_with(self, key: str) -> str | None:
        """The file of a chosen option of the user's own that sets a key, or the whole group."""
        chosen: dict[str, Any] = {**self.file.choices} if self.file is not None else {}
        for override in self.overrides:
            if (name := _key(override)) is not None and is_group(name):
                chosen[name] = parsed_override(override).value()
        for group, option in chosen.items():
            path = option_files(group, self.directories).get(str(option))
            if path is not None and path.parent.parent != CONF_DIR and key in (group, *_keys_set(path)):
                return str(path)
        return None


WholeReader = Callable[[Path], dict[str, Any]]


def read_given(overrides: Sequence[str], read_whole: WholeReader | None = None) -> Given:
    """Overrides, the file and the directories that are named among them.

    read_whole gives the values of a whole config, with the keys of today. Raises ConfigError for files and
    directories that are not there or cannot be used.
    """
    kept, files, directories = [], list[str](), list[Path]()
    for override in overrides:
        is_file, paths = _own(override)
        if is_file:
            files.append(str(paths[0]))
        elif paths:
            directories += paths
        else:
            kept.append(override)
    if len(files) > 1:
        raise ConfigError([Violation(FILE_KEY, f"found {len(files)} files, {', '.join(files)}; give one")])
    for directory in directories:
        check_directory(directory)
    file = read_user_file(files[0], read_whole) if files else None
    return Given(tuple(kept), file, tuple(directories))


def read_user_file(path: str, read_whole: WholeReader | None = None) -> UserFile:
    """The file as it stands, references not followed. Raises ConfigError."""
    if Path(path).suffix == ".json":
        values = read_whole(Path(path)) if read_whole else read_json(Path(path), FILE_KEY)
        return UserFile(path, {}, values, is_whole=True)
    if Path(path).suffix not in (".yaml", ".yml"):
        message = f"{path}: give a .yaml, or the config.json of a run"
        raise ConfigError([Violation(FILE_KEY, message)])
    values = {str(name): value for name, value in read_yaml(Path(path), FILE_KEY).items()}
    dotted = [name for name in values if "." in name]
    if dotted:
        raise ConfigError([Violation(name, f"{ONE_NAME} (in {path})") for name in dotted])
    return UserFile(path, _choices(path, values.pop("defaults", None)), values)


def check_directory(directory: Path) -> None:
    """Raises ConfigError unless it is a directory with options that have names of their own."""
    key = DIRECTORY_FLAG
    if not directory.is_dir():
        raise ConfigError([Violation(key, f"{directory}: no such directory")])
    if not any((directory / group).is_dir() for group in groups()):
        message = f"{directory}: has no folder of a group; its options are {directory}/GROUP/NAME.yaml, "
        raise ConfigError([Violation(key, f"{message}GROUP one of {', '.join(groups())}")])
    taken = [
        path
        for group in groups()
        for name, path in option_files(group, [directory]).items()
        if (own := directory / group / f"{name}.yaml") != path and own.is_file()
        if own.read_bytes() != path.read_bytes()
    ]
    if taken:
        names = shortened(str(path.relative_to(CONF_DIR)) for path in taken)
        message = f"{directory}: {names}: an option of Weft has this name; rename the file"
        raise ConfigError([Violation(key, message)])


def check_options(directories: Sequence[Path]) -> None:
    """Raises ConfigError where a file of options in the directories cannot be read."""
    found = []
    for path in (path for one in directories for group in groups() for path in (one / group).glob("*.yaml")):
        try:
            read_yaml(path, DIRECTORY_FLAG)
            parts = {f"{path.parent.name}.{section}" for section in sections()}
            if any(key.name in parts and key.value is None for key in file_keys(path)):
                found.append(Violation(DIRECTORY_FLAG, f"{path}: {FLAT}"))
        except ConfigError as error:
            found += error.violations
    if found:
        raise ConfigError(found)


def with_search_path(arguments: Sequence[str]) -> list[str]:
    """The arguments, each --config-dir DIR in them as the override that it stands for.

    Raises ConfigError for one without a directory.
    """
    kept, words = [], iter(arguments)
    for word in words:
        name, sign, value = word.partition("=")
        if name != DIRECTORY_FLAG:
            kept.append(word)
            continue
        directory = value if sign else next(words, "")
        if not directory or directory.startswith("-"):
            raise ConfigError([Violation(DIRECTORY_FLAG, "needs a directory: --config-dir DIR")])
        kept.append(f"{SEARCH_KEY}=[{quoted(_SCHEME + str(Path(directory).absolute()))}]")
    return kept


def with_absolute_paths(overrides: Sequence[str]) -> list[str]:
    """The overrides, files and directories of the user's own by paths that hold in any working directory."""
    return moved(overrides, Path.absolute)


def moved(overrides: Sequence[str], new: Callable[[Path], Path]) -> list[str]:
    """The overrides with other paths for files and directories of the user's own."""
    found = []
    for override in overrides:
        is_file, paths = _own(override)
        if is_file:
            found.append(f"{FILE_KEY}={quoted(str(new(paths[0])))}")
        elif paths:
            lines = [quoted(f"{_SCHEME}{new(path)}") for path in paths]
            found.append(f"{SEARCH_KEY}=[{','.join(lines)}]")
        else:
            found.append(override)
    return found


def own_paths(overrides: Sequence[str]) -> list[Path]:
    """Files and directories of the user's own that overrides name, as typed."""
    return list(dict.fromkeys(path for override in overrides for path in _own(override)[1]))


def _own(override: str) -> tuple[bool, list[Path]]:
    """Whether an override names a file, and the paths that it names."""
    key = _key(override)
    if key == FILE_KEY and not override.startswith("~"):
        return True, [Path(_text(override))]
    return False, _directories(override) if key == SEARCH_KEY else []


def _choices(path: str, defaults: Any) -> dict[str, str | list[str] | None]:
    """The options that a list of defaults names. Raises ConfigError for entries of another form."""
    entries = [] if defaults is None else defaults
    if not isinstance(entries, list):
        raise ConfigError([Violation(FILE_KEY, f"{path}: defaults is a list of `- GROUP: OPTION`")])
    found, violations = dict[str, Any](), []
    for number, entry in enumerate(entries, 1):
        if entry == "_self_":
            if number < len(entries):
                message = f"{path}: values of this file win over its groups; put _self_ last, or leave it out"
                violations.append(Violation(FILE_KEY, message))
            continue
        pair = list(entry.items()) if isinstance(entry, dict) else []
        group = str(pair[0][0]).removeprefix("override ").strip().removeprefix("/") if len(pair) == 1 else ""
        if not pair or not is_group(group):
            hint = did_you_mean(group, groups()) or f"; groups are {', '.join(groups())}"
            message = f"{path}: defaults entry {number} is no `GROUP: OPTION`; found {entry!r}{hint}"
            violations.append(Violation(FILE_KEY, message))
        elif pair[0][1] is not None or group != "recipe":
            found[group] = pair[0][1]
    if violations:
        raise ConfigError(violations)
    return found


def _key(override: str) -> str | None:
    from hydra.errors import HydraException

    with suppress(HydraException):
        return parsed_override(override).key_or_group
    return None


def _text(override: str) -> str:
    value = parsed_override(override).value()
    if not isinstance(value, str) or not value:
        message = f"found {override}; give the path of one file, in quotes where it has commas or brackets"
        raise ConfigError([Violation(FILE_KEY, message)])
    return value


def _directories(override: str) -> list[Path]:
    value = parsed_override(override).value()
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        message = f"found {override}; give a list, {SEARCH_KEY}=[{_SCHEME}DIR], or {DIRECTORY_FLAG} DIR"
        raise ConfigError([Violation(SEARCH_KEY, message)])
    foreign = [entry for entry in value if "://" in entry and not entry.startswith(_SCHEME)]
    if foreign:
        raise ConfigError([Violation(SEARCH_KEY, f"found {foreign[0]}; give a directory, {_SCHEME}DIR")])
    return [Path(entry.removeprefix(_SCHEME)).absolute() for entry in value]


def _keys_set(path: Path) -> list[str]:
    from yaml import YAMLError

    # A file that cannot be read is named for that.
    with suppress(YAMLError, UnicodeDecodeError):
        return [key.name for key in file_keys(path)]
    return []


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if not prefix and value == {}:
            continue
        is_inner = isinstance(value, dict) and value
        if is_inner and all(isinstance(key, str) and "." not in key for key in value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_within(key: str, above: str) -> bool:
    return key == above or key.startswith(f"{above}.")
