"""`--help`, `--help=SECTION` and `--version` of every command, from what is written beside the keys.

Nothing is composed and torch is not imported, so that an answer comes at once.
"""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml
from pydantic import BaseModel

from conf.compose import Config
from conf.errors import INTERRUPTED, ConfigError, Violation, exit_on_error
from conf.groups import CONF_DIR, group_options, groups
from conf.key_types import key_type, value_type
from conf.keys import Key, Option, default_option, options, sections, shared_keys
from conf.known_keys import did_you_mean
from conf.user_files import DIRECTORY_FLAG, SEARCH_KEY, read_given, with_search_path

WIDTH = 100
FLAG = "--help"


class Page(NamedTuple):
    """What `--help` of a command shows.

    about is the module's docstring. arguments are words and flags with what they do, fields the class of its
    `key=value` arguments. sections are the parts of the config that it takes, root imports their types; a
    command that may not import them names in shown_by the one that does.
    """

    about: str
    examples: Sequence[str]
    arguments: Mapping[str, str] = {}
    fields: type[Config] | None = None
    sections: Callable[[], Sequence[str]] = tuple
    root: Callable[[], type[BaseModel]] | None = None
    shown_by: str | None = None


def run(main: Callable[[list[str]], int | None], page: Page) -> NoReturn:
    """Answers what is asked about the command, or does it, and ends the process with its exit code."""
    try:
        with exit_on_error():
            sys.exit(answered_or_done(main, page, sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def answered_or_done(main: Callable[[list[str]], int | None], page: Page, arguments: list[str]) -> int | None:
    """The exit code of the command, or of what answers a question about it."""
    asked = question(arguments)
    has_directory = any(argument.partition("=")[0] == DIRECTORY_FLAG for argument in arguments)
    words = with_search_path(arguments) if has_directory and page.sections() else arguments
    if asked is None:
        return main(words)
    own = [word for word in words if word.startswith(SEARCH_KEY)]
    if page.shown_by is not None and asked.startswith(f"{FLAG}="):
        command = [sys.executable, "-m", page.shown_by, asked, *own]
        return subprocess.run(command, cwd=CONF_DIR.parent, check=False).returncode
    show(answer(asked, page, read_given(own).directories))
    return 0


def question(arguments: Sequence[str]) -> str | None:
    """The first argument that asks about the command instead of giving it something to do."""
    asking = (a for a in arguments if a in ("-h", FLAG, "--version") or a.startswith(f"{FLAG}="))
    return next(asking, None)


def answer(asked: str, page: Page, directories: Sequence[Path] = ()) -> str:
    """The text that a question of `question` asks for, with the options in directories of the user's own.

    Raises ConfigError for a section that is not there.
    """
    if asked == "--version":
        return f"weft {version()}\n"
    if asked.startswith(f"{FLAG}="):
        return "\n".join(section_lines(asked.partition("=")[2], page, directories)) + "\n"
    return "\n".join(page_lines(page, directories)) + "\n"


def version() -> str:
    """Ours, from pyproject.toml."""
    return tomllib.loads((CONF_DIR.parent / "pyproject.toml").read_text())["project"]["version"]


def show(text: str) -> None:
    """Prints; a reader that leaves early, as `head` does, ends it quietly."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def page_lines(page: Page, directories: Sequence[Path] = ()) -> Iterator[str]:
    """What the command does, its arguments, examples, and the config that it takes."""
    yield from page.about.strip().replace("`", "").splitlines()
    taken = page.sections()
    asks = {f"{FLAG}=SECTION": "keys of a group or a part of it: types, ranges, defaults"} if taken else {}
    arguments = {**page.arguments, **asks, FLAG: "this page", "--version": "the version of Weft"}
    yield from ("", "Arguments")
    if page.fields is not None:
        for name, field in page.fields.model_fields.items():
            default = name.upper() if field.is_required() else json.dumps(field.default)
            key = Key(f"{name}={default}", "", field.description or "")
            yield from _key_lines(key, key_type(page.fields, (name,), None))
    yield from _table(arguments)
    yield from ("", "Examples")
    yield from (f"  {example}" for example in page.examples)
    chosen = [name for name in taken if name in groups()]
    if chosen:
        yield from ("", "Config groups, GROUP=OPTION; * is the default")
        yield from _table({group: " ".join(_starred(group, directories)) for group in chosen})
    if rest := [name for name in taken if name not in chosen]:
        yield from ("", f"Parts of the config without options: {', '.join(rest)}")


def section_lines(asked: str, page: Page, directories: Sequence[Path] = ()) -> Iterator[str]:
    """The keys of a group, of a part of it, or of another part of the config. Raises ConfigError."""
    section = asked.split(".")[0]
    taken = page.sections()
    if section not in taken:
        raise ConfigError([Violation(f"{FLAG}={asked}", _unknown_section(section, taken))])
    root = page.root() if page.root is not None else None
    shared, found = shared_keys(section), options(section, directories) if section in groups() else []
    known = [key.name for key in (*shared, *(key for choice in found for key in choice.keys))]
    if asked != section and not any(_is_within(name, asked) for name in known):
        message = f"no such key or part of {section}{did_you_mean(asked, known)}"
        raise ConfigError([Violation(f"{FLAG}={asked}", message)])
    yield from _typed_lines([key for key in shared if _is_within(key.name, asked)], root, None)
    if section == "mixer":
        yield from _mixer_lines(asked, found, root)
    elif found:
        yield from _option_lines(section, asked, found, root)


def _option_lines(
    group: str, asked: str, found: Sequence[Option], root: type[BaseModel] | None
) -> Iterator[str]:
    """The default option with all its keys, of the others what they have otherwise."""
    first: dict[str, Key] = {}
    for choice in found:
        keys = [key for key in choice.keys if _is_within(key.name, asked)]
        keys = [key for key in keys if first.get(key.name) != key]
        if asked == group:
            mark = " (default)" if choice.name == default_option(group) else ""
            yield from _wrapped(f"{group}={choice.name}{mark}: {choice.about}", "", "    ")
        elif keys:
            yield f"{group}={choice.name}"
        said = {name: key.comment for name, key in first.items()}
        shown = [key._replace(comment="") if said.get(key.name) == key.comment else key for key in keys]
        yield from _typed_lines(shown, root, choice)
        first = first or {key.name: key for key in choice.keys}


def _mixer_lines(asked: str, found: Sequence[Option], root: type[BaseModel] | None) -> Iterator[str]:
    """What each mixer is; the keys of one that is asked for."""
    if asked == "mixer":
        yield "A layout names mixers; all of them are composed, and a key is mixer.NAME.KEY."
        yield "Their keys: --help=mixer.NAME"
        yield from _table({choice.name: choice.about for choice in found})
        return
    for choice in found:
        keys = [key for key in choice.keys if _is_within(key.name, asked)]
        if keys:
            yield from _wrapped(f"mixer.{choice.name}: {choice.about}", "", "    ")
            yield from _typed_lines(keys, root, choice)


def _typed_lines(keys: Sequence[Key], root: type[BaseModel] | None, choice: Option | None) -> Iterator[str]:
    kinds = {key.name: key.value for key in choice.keys} if choice is not None else {}
    for key in keys:
        if key.value is None and not key.comment:
            continue
        parts = key.name.split(".")
        found = None if root is None else key_type(root, parts, kinds.get(f"{parts[0]}.kind"))
        if found is None and key.value is not None:
            found = value_type(yaml.safe_load(key.value))
        if key.value == "???":
            found = f"{found}, to be given"
        shown = key if key.value is None else key._replace(name=f"{key.name}={key.value}")
        yield from _key_lines(shown, found)


def _key_lines(key: Key, kind: str | None) -> Iterator[str]:
    yield f"  {key.name:<34}  {kind}" if kind and key.value is not None else f"  {key.name}"
    if key.comment:
        yield from _wrapped(key.comment, "      ", "      ")


def _table(rows: Mapping[str, str]) -> Iterator[str]:
    width = max((len(name) for name in rows), default=0) + 4
    for name, text in rows.items():
        yield from _wrapped(text, f"  {name}".ljust(width), " " * width)


def _wrapped(text: str, first: str, later: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
    return lines or [first.rstrip()]


def _starred(group: str, directories: Sequence[Path]) -> list[str]:
    default = default_option(group)
    return [f"{name}*" if name == default else name for name in group_options(group, directories)]


def _unknown_section(section: str, taken: Sequence[str]) -> str:
    if not taken:
        return f"this command takes no config; {FLAG} shows its arguments"
    if section in sections():
        return f"this command reads no {section}; it reads {', '.join(taken)}"
    hint = did_you_mean(section, taken) or f"; there are {', '.join(taken)}"
    return f"no such part of the config{hint}"


def _is_within(name: str, asked: str) -> bool:
    return name == asked or name.startswith(f"{asked}.")
