"""The words of slurm.submit: overrides of the run, flags that are keys of it, and options of sbatch."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from conf.errors import ConfigError, Violation

DRY_RUN = "--dry-run"
# Flags of sbatch that are keys of the run's config, so that one list of checks sees them.
KEYS = {
    "--nodes": "cluster.nodes",
    "--gpus-per-node": "cluster.gpus_per_node",
    "--time": "slurm.time",
    "--partition": "slurm.partition",
    "--account": "slurm.account",
    "--job-name": "slurm.job_name",
    "--qos": "slurm.qos",
    "--reservation": "slurm.reservation",
    "--constraint": "slurm.constraint",
    "--mem": "slurm.memory",
    "--exclude": "slurm.exclude",
    "--mail-user": "slurm.mail_user",
}
SHORT = {
    "-N": "--nodes",
    "-t": "--time",
    "-p": "--partition",
    "-A": "--account",
    "-J": "--job-name",
    "-q": "--qos",
    "-C": "--constraint",
    "-x": "--exclude",
    "-a": "--array",
    "-n": "--ntasks",
    "-G": "--gpus",
}
_SIZE = (
    "a run has cluster.nodes times cluster.gpus_per_node processes; set these, or --nodes, --gpus-per-node"
)
# What would make another job than the one that was checked.
REFUSED = {
    "--wrap": "the job is the script of this repository; leave it out",
    "--array": "its tasks would share one run.dir; submit each run by itself",
    "--ntasks": _SIZE,
    "--ntasks-per-node": _SIZE,
    "--ntasks-per-gpu": _SIZE,
    "--gpus": _SIZE,
    "--gpus-per-task": _SIZE,
    "--gpus-per-socket": _SIZE,
    "--gres": _SIZE,
}
_WHOLE = ("--nodes", "--gpus-per-node")
_OVERRIDE = re.compile(r"(\+{0,2}|~)[A-Za-z_][\w./@-]*=.*|~[A-Za-z_][\w./@-]*", re.DOTALL)


@dataclass
class Options:
    """What was typed: overrides of the run, values of flags that are keys of it, other options of sbatch."""

    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    is_dry: bool = False

    @property
    def lines(self) -> list[str]:
        """The overrides, and the flags as overrides, which win."""
        found = []
        for flag, value in self.flags.items():
            # A number stays one; any other value is one word, whatever it holds.
            found.append(f"{KEYS[flag]}={value}" if value.isdecimal() else quoted(KEYS[flag], value))
        if "--gpus-per-node" in self.flags:
            found.append("cluster.device=cuda")
        return [*self.overrides, *found]


def quoted(key: str, value: str) -> str:
    """The override that gives a key exactly this text, which holds neither a backslash nor a dollar."""
    mark = '"' if "'" in value else "'"
    inner = value.replace(mark, f"\\{mark}")
    return f"{key}={mark}{inner}{mark}"


def read_options(words: Sequence[str]) -> Options:
    """The words of the command line, told apart. Raises ConfigError for each that cannot be used."""
    found, violations = Options(), list[Violation]()
    for word, value in _paired(words):
        name, sign, rest = word.partition("=")
        flag = SHORT.get(name[:2], name) if not name.startswith("--") else name
        if not word.startswith("-"):
            violations += _override_violations(word)
            found.overrides.append(word)
        elif word == DRY_RUN:
            found.is_dry = True
        elif flag in KEYS:
            text = value if value is not None else rest if sign else name[2:] if name != flag else ""
            violations += _value_violations(word, flag, text)
            found.flags[flag] = text
        elif flag in REFUSED:
            violations.append(Violation(name, REFUSED[flag]))
        else:
            violations += _foreign_violations(word)
            found.passed += [word] if value is None else [word, value]
    if violations:
        raise ConfigError(violations)
    return found


def _paired(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each word, an option with the word behind it that is its value."""
    index = 0
    while index < len(words):
        word, following = words[index], words[index + 1] if index + 1 < len(words) else None
        index += 1
        is_own = word in KEYS or SHORT.get(word) in KEYS
        # -N2 and --nodes=2 hold their value themselves.
        is_open = word.startswith("--") and "=" not in word and word != DRY_RUN
        is_open |= len(word) == 2 and word.startswith("-")
        if is_open and following and not following.startswith("-") and (is_own or "=" not in following):
            yield word, following
            index += 1
        else:
            yield word, None


def _override_violations(word: str) -> list[Violation]:
    if not word.isprintable():
        return [Violation(repr(word), "holds a character that is not printed; leave it out")]
    if _OVERRIDE.fullmatch(word):
        return []
    return [Violation(word, "neither an override, key=value, nor an option; --help lists both")]


def _value_violations(word: str, flag: str, text: str) -> list[Violation]:
    if not text or not text.isprintable() or "\\" in text or "$" in text:
        return [Violation(flag, f"needs a plain value; found {text!r}")]
    if flag in _WHOLE and not text.isdecimal():
        return [Violation(flag, f"must be a whole number; found {text!r}")]
    return []


def _foreign_violations(word: str) -> list[Violation]:
    name = word.partition("=")[0]
    meant = [own for own in (*KEYS, *REFUSED, DRY_RUN) if own.startswith(name) and name.startswith("--")]
    if not word.isprintable():
        return [Violation(repr(word), "holds a character that is not printed; leave it out")]
    if meant:
        return [Violation(name, f"write it in full: {' or '.join(meant)}")]
    return []
