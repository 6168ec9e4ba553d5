"""The folders of options: those of conf/, and those of directories of a user's own that stand behind them."""

from collections.abc import Sequence
from pathlib import Path

CONF_DIR = Path(__file__).parent


def is_group(name: str) -> bool:
    """Whether options are chosen under this name."""
    return name.isidentifier() and (CONF_DIR / name).is_dir() and any((CONF_DIR / name).glob("*.yaml"))


def groups() -> list[str]:
    """Names of the folders of conf/ that hold options, sorted."""
    return sorted(path.name for path in CONF_DIR.iterdir() if is_group(path.name))


def group_options(group: str, directories: Sequence[Path] = ()) -> list[str]:
    """Names of the options of a group, in conf/ and in further directories, sorted."""
    return sorted(option_files(group, directories))


def option_files(group: str, directories: Sequence[Path] = ()) -> dict[str, Path]:
    """The file of each option of a group; of several with one name the first, conf/ before all."""
    found = dict[str, Path]()
    for directory in (CONF_DIR, *directories):
        for path in (directory / group).glob("*.yaml"):
            found.setdefault(path.stem, path)
    return found
