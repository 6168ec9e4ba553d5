"""The seeded defects fit the tree as it is, and what the runner says of them is true."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.mutants.__main__ import main
from tests.mutants.defects import FOLDERS, Defect, DefectError, draw, load
from tests.mutants.report import is_good, summary, table
from tests.mutants.trial import Outcome, attempt_all

HERE = Path(__file__).parent
TREE = HERE.parent.parent
DEFECTS = load(HERE)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_defect_fits_the_tree(folder: str) -> None:
    own = [defect for defect in DEFECTS if defect.folder == folder]
    assert own
    for defect in own:
        defect.text(TREE)
        assert defect.missing_tests(TREE) == [], defect.name


def test_there_are_as_many_as_the_pages_say() -> None:
    assert {defect.folder for defect in DEFECTS} == set(FOLDERS)
    assert len(DEFECTS) >= 300


def test_samples_of_seeds_in_a_row_are_all_defects_once() -> None:
    names = [f"{number}" for number in range(10)]
    defects = [seeded(name, "a", "b") for name in names]
    days = [[defect.name for defect in draw(defects, 3, seed)] for seed in range(738_000, 738_010)]
    drawn = [name for day in days for name in day]
    # Ten days of three are three rounds of ten.
    assert sorted(drawn) == sorted(names * 3)
    assert all(sorted(drawn[start : start + 10]) == names for start in (0, 10, 20))
    assert days[0] == [defect.name for defect in draw(defects, 3, 738_000)]
    assert len(draw(defects, 30, 1)) == 10


def test_a_change_that_fits_nowhere_twice_or_to_nothing_readable_is_refused(toy: Path) -> None:
    for old, new, says in (
        ("no such text", "x", "0 times"),
        ("value", "x", "2 times"),
        ("return value + 1", "return (", "cannot be read"),
    ):
        with pytest.raises(DefectError, match=says):
            seeded("change", old, new).text(toy)
    found = replace(
        seeded("tests", "+", "-"), tests=("tests/test_toy.py::test_up", "tests/none.py", f"{UP}s")
    )
    assert found.missing_tests(toy) == ["tests/none.py", f"{UP}s"]


UP = "tests/test_toy.py::test_up"
TESTS = """
import os, pathlib, subprocess, time

from kernels.toy import down, up


def test_up():
    source = pathlib.Path("kernels/toy.py")
    with pathlib.Path("{pid}").with_name("moments").open("a") as file:
        print(int(source.stat().st_mtime), file=file)
    assert up(1) == 2


def test_slow():
    time.sleep(600)


def test_down():
    if down(1) != 0:
        child = subprocess.Popen(["sleep", "600"])
        pathlib.Path("{pid}").write_text(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(600)


def test_always_fails():
    assert up(1) == 3
"""


def seeded(name: str, old: str, new: str, *tests: str) -> Defect:
    return Defect(name, "kernels/toy.py", "what it breaks", old, new, tests or (UP,))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A tree of two functions and their tests, with the runner's own files."""
    tree = tmp_path / "tree"
    shutil.copytree(HERE, tree / "tests" / "mutants", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "kernels").mkdir()
    (tree / "kernels" / "toy.py").write_text(
        "def up(value):\n    return value + 1\n\n\ndef down(number):\n    return number - 1\n"
    )
    (tree / "tests" / "test_toy.py").write_text(TESTS.format(pid=tmp_path / "pid"))
    (tree / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    return tree


def test_a_defect_is_caught_lives_breaks_or_is_blamed_wrongly(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = toy / "kernels" / "toy.py"
    before, moment = source.read_text(), int(source.stat().st_mtime)
    defects = [
        seeded("caught", "value + 1", "value - 1"),
        seeded("lived", "value + 1", "1 + value"),
        seeded("broken", "def up", "def pu"),
        seeded("no-such-test", "value + 1", "value - 1", "tests/test_toy.py::test_none"),
        seeded("unproven", "value + 1", "value - 1", "tests/test_toy.py::test_always_fails"),
    ]
    found = {outcome.defect.name: outcome for outcome in attempt_all(defects, toy, seconds=60.0, heavy=())}
    verdicts = {name: outcome.verdict for name, outcome in found.items()}
    assert verdicts == {
        "caught": "caught",
        "lived": "lived",
        "broken": "broken",
        "no-such-test": "broken",
        "unproven": "unproven",
    }
    assert found["caught"].failed == (UP,)
    assert "ImportError" in found["broken"].log
    assert source.read_text() == before
    # Compiled modules are known by size and whole second of the source: each change has a second of its own,
    # and what failed is judged once more by the source as it is.
    moments = [int(line) - moment for line in (tmp_path / "moments").read_text().split()]
    assert moments == [1, 2, 0]
    assert "caught" in capsys.readouterr().out


def test_a_hang_of_the_defect_counts_as_noticed_and_a_slow_test_does_not(toy: Path, tmp_path: Path) -> None:
    defects = [
        seeded("hangs", "number - 1", "number - 2", "tests/test_toy.py::test_down"),
        seeded("slow", "number - 1", "number - 2", "tests/test_toy.py::test_slow"),
    ]
    outcomes = attempt_all(defects, toy, seconds=10.0, heavy=())
    assert [outcome.verdict for outcome in outcomes] == ["timed out", "unproven"]
    pids = [int(pid) for pid in (tmp_path / "pid").read_text().split()]
    assert len(pids) == 2
    assert [pid for pid in pids if is_running(pid)] == []


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def outcomes_of(counts: dict[str, int], lives: str = "") -> list[Outcome]:
    defect = replace(seeded("name", "a", "b"), lives=lives)
    return [Outcome(defect, verdict, 1.0) for verdict, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "reason", "good"),
    [
        ({"caught": 18, "timed out": 2}, "", True),
        ({"caught": 19, "lived": 1}, "no number changes", True),
        ({"caught": 19, "lived": 1}, "", False),
        ({"caught": 18, "lived": 2}, "no number changes", False),
        ({"caught": 99, "broken": 1}, "no number changes", False),
        ({"caught": 99, "unproven": 1}, "no number changes", False),
    ],
)
def test_95_percent_and_a_reason_for_every_other_one(counts: dict[str, int], reason: str, good: bool) -> None:
    outcomes = outcomes_of(counts, reason)
    assert is_good(outcomes) == good
    assert summary(outcomes)["folders"]["kernels"] == {
        verdict: counts.get(verdict, 0) for verdict in ("caught", "timed out", "lived", "broken", "unproven")
    }
    assert table(outcomes).count("name (kernels/toy.py)") == sum(counts.values()) - counts["caught"]


def test_the_command_says_what_it_drew_and_ends_with_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[Defect]] = []

    def answered(verdict: str) -> Callable[..., list[Outcome]]:
        def attempted(defects: list[Defect], *_: object, **__: object) -> list[Outcome]:
            seen.append(defects)
            return [Outcome(defect, verdict, 1.0) for defect in defects]

        return attempted

    command = sys.modules[main.__module__]
    monkeypatch.setattr(command, "attempt_all", answered("caught"))
    assert main(["--count", "4", "--seed", "7"]) == 0
    assert "--count 4 --seed 7" in capsys.readouterr().out
    assert seen.pop() == draw(DEFECTS, 4, 7)
    monkeypatch.setattr(command, "attempt_all", answered("broken"))
    assert main(["slurm", "--name", "submit"]) == 1
    drawn = seen.pop()
    assert drawn == [defect for defect in DEFECTS if defect.folder == "slurm" and "submit" in defect.name]
    assert main(["--name", "no such name"]) == 2
