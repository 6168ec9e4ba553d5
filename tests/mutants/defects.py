"""Seeded defects: mistakes that people make, as changes of one file, with the tests that must notice."""

import ast
import random
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDERS = ("kernels", "model", "parallel", "data", "train", "conf", "slurm")
# Any fixed number: it only decides which defects stand side by side in a sample.
ORDER = 20261129


class DefectError(ValueError):
    """A defect that cannot be tried: its file is not written as it says, or it names no such test."""


@dataclass(frozen=True)
class Defect:
    """One change of one file, and the tests that are nearest to it."""

    name: str
    file: str
    breaks: str  # what goes wrong, in one line
    old: str
    new: str
    tests: tuple[str, ...]
    interpreted: bool = False  # the tests run Triton's interpreter
    lives: str = ""  # why no test can notice; empty where one must

    @property
    def folder(self) -> str:
        """The top folder of its file."""
        return self.file.split("/")[0]

    def text(self, tree: Path) -> str:
        """The file of `tree` with the defect in it.

        Raises DefectError where the old text does not stand there exactly once, or where what comes out
        cannot be read any more as Python, YAML or a script of bash.
        """
        text = (tree / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise DefectError(f"{self.name}: {self.file} has the old text {count} times; it must be once")
        changed = text.replace(self.old, self.new)
        if why := _unreadable(self.file, changed):
            raise DefectError(f"{self.name}: {self.file} cannot be read any more: {why}")
        return changed

    def missing_tests(self, tree: Path) -> list[str]:
        """Those of its tests that `tree` does not have."""
        return [test for test in self.tests if not _has_test(tree, test)]


def load(folder: Path) -> list[Defect]:
    """All defects in the files of `folder`, in their order.

    Raises DefectError for two of one name, and for one that changes nothing or names no test.
    """
    found = [defect for file in sorted(folder.glob("*.toml")) for defect in _of_file(file)]
    names = [defect.name for defect in found]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise DefectError(f"more than one defect has the name {', '.join(doubles)}")
    for defect in found:
        if defect.old == defect.new or not defect.tests or not defect.breaks:
            raise DefectError(f"{defect.name}: needs a change, what it breaks, and a test")
    return found


def draw(defects: Sequence[Defect], count: int, seed: int) -> list[Defect]:
    """`count` of the defects. Seeds that follow one another draw all in turn."""
    shuffled = list(defects)
    random.Random(ORDER).shuffle(shuffled)
    start = seed * count % len(shuffled)
    return [shuffled[(start + n) % len(shuffled)] for n in range(min(count, len(shuffled)))]


def _of_file(file: Path) -> list[Defect]:
    described: dict[str, Any] = tomllib.loads(file.read_text())
    found: list[Defect] = []
    for source in described["file"]:
        shared = {"tests": source["tests"], "interpreted": source.get("interpreted", False)}
        for entry in source["defect"]:
            values = shared | entry
            values["tests"] = tuple(values["tests"])
            found.append(Defect(file=source["path"], **values))
    return found


def _unreadable(file: str, text: str) -> str:
    if file.endswith(".sbatch"):
        return subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr
    try:
        if file.endswith(".py"):
            ast.parse(text)
        else:
            yaml.safe_load(text)
    except (SyntaxError, yaml.YAMLError) as error:
        return str(error)
    return ""


def _has_test(tree: Path, test: str) -> bool:
    file, _, name = test.partition("::")
    return (tree / file).is_file() and (not name or name.partition("[")[0] in _functions(tree / file))


@cache
def _functions(file: Path) -> frozenset[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))
