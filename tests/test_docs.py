"""Links of the pages lead somewhere, and the commands in them are legal."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from conf.errors import ConfigError
from train.config.load import load_config

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMAND = r"(?:python -m|torchrun [^`\n]*?-m|sbatch(?= slurm)) ([a-z][^`\n]+)"
# Commands whose arguments are the config of a run.
RUNS = ("train", "train.check", "train.plan", "train.rehearse", "slurm.submit", "slurm/pretrain.sbatch")


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


def test_readme_names_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    names = [f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"]
    assert [name for name in names if name not in text] == []


def commands() -> list[tuple[str, list[str]]]:
    """Module or script of each command in the pages, and its arguments."""
    found = []
    for page in PAGES:
        for text in re.findall(COMMAND, page.read_text()):
            module, *rest = shlex.split(re.split(r"  +|, | #", text)[0], comments=True)
            if re.fullmatch(r"[a-z_./]+", module):
                found.append((module, rest))
    return found


def test_commands_are_legal() -> None:
    checked = 0
    for module, arguments in commands():
        if module.endswith(".sbatch"):
            assert (ROOT / module).exists(), module
        else:
            assert importlib.util.find_spec(module), module
        overrides = [x for x in arguments if not x.startswith("-") and "," not in x]
        # What stands in capitals is the reader's to fill in.
        if module in RUNS and not any(re.search(r"=[A-Z_]+$|start=", x) for x in overrides):
            try:
                load_config(overrides, None)
            except ConfigError as error:
                if "optim.lrr=1" not in overrides:
                    raise AssertionError(f"{module} {overrides}: {error}") from error
            checked += 1
    assert checked > 15
