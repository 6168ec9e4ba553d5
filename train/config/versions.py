"""Configs of older versions as this one reads them: a rule for each key that came, went or moved."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from conf.errors import CheckpointError, ConfigError, Violation
from conf.tree import copied, parent_of

# Under this key config.json says which version of the keys it has; one without is of version 0.
VERSION_KEY = "version"


class Added(NamedTuple):
    """A key that runs from before `version` do not have: `value` is what they did."""

    version: int
    key: str
    value: Any


class Removed(NamedTuple):
    """A key that is gone since `version`: `value` is the one whose behaviour stayed."""

    version: int
    key: str
    value: Any


class Renamed(NamedTuple):
    """A key that has another name since `version`."""

    version: int
    key: str
    new: str


Rule = Added | Removed | Renamed

# In order of their versions. A change of a key adds one, with the next version.
RULES: tuple[Rule, ...] = (
    Added(1, "train.foreign_ids", False),
    Added(1, "checkpoint.accept_step", None),
    Added(1, "parallel.storage_timeout_seconds", 3600),
    Added(1, "run.name", "default"),
    Added(2, "track.group", None),
    Added(2, "track.router_every", 100),
    Added(2, "track.log_every", 10),
    Added(2, "sample.every", None),
    Added(3, "train.vocab_multiple", 128),
    Added(3, "data.tokenizer.train", "sentencepiece"),
    Added(3, "data.tokenizer.bos", None),
    Added(3, "data.tokenizer.eos", None),
    Added(3, "data.tokenizer.pattern", None),
    Added(3, "data.tokenizer.parses_special", False),
    Added(3, "data.tokenizer.allows_changes", False),
    Added(3, "moe.weight_eps", 1e-20),
)
VERSION = RULES[-1].version


def upgraded(saved: dict[str, Any], where: str, rules: Sequence[Rule] = RULES) -> dict[str, Any]:
    """The config tree that `where` holds, with the keys of today; its version is taken out.

    Raises CheckpointError for a tree of a newer version, ConfigError for a removed key with a value that
    nothing does any more.
    """
    tree = copied(saved)
    version = tree.pop(VERSION_KEY, 0)
    newest = rules[-1].version
    if not isinstance(version, int) or version > newest:
        raise CheckpointError(
            f"{where}: written by a newer version of Weft (its keys are of version {version}, this one knows "
            f"{newest}); go on with the version that wrote it"
        )
    gone = [violation for rule in rules if rule.version > version for violation in _apply(rule, tree, where)]
    if gone:
        raise ConfigError(gone)
    return tree


def _apply(rule: Rule, tree: dict[str, Any], where: str) -> Iterable[Violation]:
    parent, name = parent_of(tree, rule.key)
    if isinstance(rule, Added):
        if parent is not None:
            parent.setdefault(name, rule.value)
    elif parent is not None and name in parent:
        value = parent.pop(name)
        if isinstance(rule, Renamed):
            target, new = parent_of(tree, rule.new)
            if target is not None:
                target[new] = value
        elif value != rule.value:
            message = (
                f"{where}: the run was started with {value!r}, and this version has only what {rule.value!r} "
                "was; go on with the version that started it"
            )
            yield Violation(rule.key, message)
