"""The commands of README run as they are printed there, and print what stands below them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.train.runs import free_port

ROOT = Path(__file__).parent.parent


class Shown(NamedTuple):
    """A command of the page, and the lines that stand below it."""

    command: str
    output: list[str]


def blocks() -> list[list[Shown]]:
    """The commands of each block, which build on one another."""
    text = (ROOT / "README.md").read_text()
    fences = re.findall(r"^```\n(\$ .*?)^```", text, re.MULTILINE | re.DOTALL)
    return [[Shown(*split(part)) for part in fence.split("$ ")[1:]] for fence in fences]


def split(part: str) -> tuple[str, list[str]]:
    command, *output = part.splitlines()
    return command, output


def first_of(block: list[Shown]) -> str:
    return block[0].command.removeprefix("python -m ")


def pattern(line: str) -> re.Pattern[str]:
    """What a shown line stands for: white space is free, an ellipsis is anything."""
    parts = [re.escape(" ".join(part.split())) for part in line.split("…")]
    return re.compile(".*".join(parts))


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default dataset, made of the few documents of this tree."""
    directory = tmp_path_factory.mktemp("corpora")
    source = f"data.corpora.stdlib.source={ROOT / 'tests'}"
    made = execute(f"python -m data.prepare data.directory=stdlib {source} data.workers=0", directory)
    assert made.returncode == 0, made.stdout
    return directory


def execute(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs a line of the shell in a directory, its files those of this tree; both outputs are one."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PET_"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # The default port of torchrun may be another's.
        "PET_MASTER_PORT": str(free_port()),
    }
    return subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def check(shown: Shown, directory: Path) -> None:
    """The first shown line is printed, and every error; later lines are figures of one machine."""
    result = execute(shown.command, directory)
    errors = [line for line in shown.output if line.startswith("error: ")]
    assert result.returncode == (64 if errors else 0), result.stdout
    printed = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for wanted in errors or shown.output[:1]:
        assert any(pattern(wanted).fullmatch(line) for line in printed), f"{wanted}\n{result.stdout}"


def test_mistakes_come_back_as_shown(tmp_path: Path) -> None:
    found = [shown for block in blocks() for shown in block if "optim.lrr" in shown.command]
    assert len(found) == 1
    check(found[0], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.xdist_group("readme")
@pytest.mark.parametrize("block", blocks(), ids=first_of)
def test_commands_print_what_is_shown(block: list[Shown], corpora: Path, tmp_path: Path) -> None:
    (tmp_path / "corpora").symlink_to(corpora)
    for shown in block:
        check(shown, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"corpora", "runs", "multirun.yaml"}


def test_the_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    assert sum(len(block) for block in blocks()) >= 10
