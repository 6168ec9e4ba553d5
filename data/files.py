"""The files of a corpus, and what stands beside them and is not read."""

import glob
import os
import stat
import sysconfig
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from conf.errors import DataError
from conf.names import shortened
from data.config import ROW_ENDINGS, STDLIB, CorpusConfig

# Never source: caches, version control, and packages that are installed beside the standard library.
_SKIPPED_DIRECTORIES = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
_SHOWN_NAMES = 3


class Files(NamedTuple):
    """Files to read, sorted, and a line for each reason for which others are not."""

    paths: list[Path]
    passed_over: list[str]


def find_files(name: str, corpus: CorpusConfig) -> Files:
    """Files of a corpus. Links are followed, and no folder is entered twice.

    Raises DataError when there are none, for a folder that cannot be read, and for a link to nothing.
    """
    key = f"data.corpora.{name}.source={corpus.source}"
    is_stdlib = corpus.source == STDLIB and corpus.kind in ("code", "text")
    source = Path(sysconfig.get_path("stdlib") if is_stdlib else corpus.source).expanduser()
    suffixes = corpus.suffixes or ((".py",) if is_stdlib else ())
    if source.is_dir() and not suffixes:
        # Beside rows lie readmes, licences and the files of whatever wrote them.
        suffixes = ROW_ENDINGS.get(corpus.kind, ())
    if source.is_file():
        return Files([source], [])
    if source.is_dir():
        found = _Found()
        found.walk(source)
    elif glob.has_magic(str(source)):
        found = _Found()
        found.match(str(source))
    else:
        raise DataError(f"{key}: no such file or directory; correct the path")
    files = Files(found.select(suffixes), found.lines())
    if not files.paths:
        wanted = f" ending in {', '.join(suffixes)}" if suffixes else ""
        beside = f" beside {'; '.join(files.passed_over)}" if files.passed_over else ""
        raise DataError(f"{key}: found no file{wanted}{beside}; correct the source")
    return files


class _Found:
    """What is found below a folder or by a glob, files and the rest by the reason why it is not read."""

    def __init__(self) -> None:
        self._root: Path | None = None  # names are shown from here on; those of a glob as it gives them
        self._paths: list[Path] = []
        self._passed_over: dict[str, list[str]] = defaultdict(list)
        self._entered: set[tuple[int, int]] = set()

    def walk(self, root: Path) -> None:
        """Takes what is below the root, and then, in order, what is behind links to folders."""
        self._root, links = root, [root]
        # Real folders first: which name of a folder its files get must not depend on the order of a listing.
        while links:
            links = sorted(link for start in links for link in self._enter(start))

    def match(self, pattern: str) -> None:
        """Takes what a glob finds; a folder in which it finds nothing is passed over."""
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        self._paths = [path for path in matches if not path.is_dir()]
        entered = {folder for path in self._paths for folder in path.parents}
        self._pass_over("folders that the glob does not enter", set(matches) - {*self._paths} - entered)

    def select(self, suffixes: tuple[str, ...]) -> list[Path]:
        """The files with these endings, sorted. Raises DataError for one that cannot be opened."""
        wanted = [path for path in self._paths if not suffixes or path.name.endswith(suffixes)]
        self._pass_over(f"not ending in {', '.join(suffixes)}", set(self._paths) - set(wanted))
        files = [path for path in wanted if stat.S_ISREG(_mode(path))]
        self._pass_over("that are no files", set(wanted) - set(files))
        return sorted(files)

    def lines(self) -> list[str]:
        """Count, reason and first names of what is not read."""
        return [
            f"{len(names):,} {reason}: {shortened(names, _SHOWN_NAMES)}"
            for reason, names in sorted(self._passed_over.items())
        ]

    def _enter(self, start: Path) -> list[Path]:
        """Takes the files below a folder; gives the links to folders."""
        links = []
        for folder, folders, names in os.walk(start, onerror=_refuse):
            here, status = Path(folder), os.stat(folder)
            identity = status.st_dev, status.st_ino
            if identity in self._entered:
                folders.clear()
                self._pass_over("folders read already under another name", [here])
                continue
            self._entered.add(identity)
            hidden = {name for name in (*folders, *names) if name.startswith(".")}
            skipped = _SKIPPED_DIRECTORIES & set(folders)
            self._pass_over("hidden", [here / name for name in hidden])
            self._pass_over("folders of caches or packages", [here / name for name in skipped])
            linked = {name for name in {*folders} - hidden - skipped if (here / name).is_symlink()}
            links += [here / name for name in linked]
            # In place: what is taken out is not walked, and site-packages may hold more than all the rest.
            folders[:] = sorted({*folders} - hidden - skipped - linked)
            self._paths += [here / name for name in names if name not in hidden]
        return links

    def _pass_over(self, reason: str, paths: Iterable[Path]) -> None:
        for path in paths:
            self._passed_over[reason].append(str(path.relative_to(self._root) if self._root else path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            reason = f"a link to {os.readlink(path)}, which is not there"
            raise DataError(f"{path}: {reason}; bring that back, or leave the link out") from error
        raise DataError(f"{path}: cannot read: {error.strerror}; leave it out") from error


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot read: {error.strerror}; leave it out") from error
