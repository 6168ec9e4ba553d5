"""Overrides as Hydra reads them: one by one, the runs of a sweep, and a plain tree as overrides."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError, Violation
from conf.groups import group_options

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OptionsOf = Callable[[str], list[str]]

# A value that is no list, mapping, function or several values, and not in quotes; it may hold references.
_PLAIN = re.compile(r"""(?:[^\s'"\\\[\](){},]|\$\{[^{}'"\\]*\}|[^\S\n](?=\S))+""")


@cache
def parsed_override(line: str) -> "Override":
    """One override as Hydra reads it. Raises HydraException."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(readable(line))


def readable(override: str) -> str:
    """The override, its value in quotes where it is a plain one with letters that Hydra reads only there."""
    key, sign, value = override.partition("=")
    is_plain = _PLAIN.fullmatch(value) is not None
    return override if value.isascii() or not is_plain else f"{key}{sign}'{value}'"


def quoted(text: str) -> str:
    """The text as a value in quotes that Hydra reads as it was."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def sweep_jobs(overrides: Sequence[str], options_of: OptionsOf = group_options) -> list[list[str]]:
    """The overrides of each run of a sweep: every combination of the values that they give.

    options_of names those of a group, among which a pattern picks.

    Raises ConfigError for bad syntax and for an interval, which has no list of values.
    """
    from hydra.errors import HydraException

    choices, violations = list[list[str]](), []
    for override in overrides:
        try:
            parsed = parsed_override(override)
            choices.append(_choices(override, parsed, options_of))
        except HydraException as error:
            hint = "give values with commas, key=1,2"
            violations.append(Violation(override, f"not an override of a sweep: {first_line(error)}; {hint}"))
    if violations:
        raise ConfigError(violations)
    return [list(chosen) for chosen in product(*choices)]


def _choices(override: str, parsed: "Override", options_of: OptionsOf) -> list[str]:
    from hydra.core.override_parser.types import Glob

    if not parsed.is_sweep_override():
        return [override]
    value = parsed.value()
    if isinstance(value, Glob):
        return [f"{parsed.key_or_group}={name}" for name in value.filter(options_of(parsed.key_or_group))]
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


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
