"""Links of the pages lead somewhere, the commands in them are legal, and their diffs are in the tree."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.user_files import with_search_path
from train.config.load import load_config
from train.config.versions import VERSION, VERSION_KEY

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMAND = r"(?:python -m|torchrun [^`\n]*?-m|sbatch(?= slurm)) ([a-z][^`\n]+)"
# Commands whose arguments are the config of a run.
RUNS = ("train", "train.check", "train.plan", "train.rehearse", "slurm.submit", "slurm/pretrain.sbatch")


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


def test_readme_names_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    names = [f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"]
    assert [name for name in names if name not in text] == []


def write_files(folder: Path) -> None:
    """The files that pages show under their names, and the config of a run that they go on from."""
    for page in PAGES:
        for name, text in re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", page.read_text(), re.M | re.S):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    (folder / "typo.yaml").write_text("optim: {lrr: 1}\n")
    (folder / "runs/smoke").mkdir(parents=True)
    run = load_config(["recipe=smoke"], None).model_dump(mode="json")
    (folder / "runs/smoke/config.json").write_text(json.dumps({VERSION_KEY: VERSION, **run}))


def commands() -> list[tuple[str, list[str]]]:
    """Module or script of each command in the pages, and its arguments."""
    found = []
    for page in PAGES:
        for text in re.findall(COMMAND, page.read_text().replace("\\\n", " ")):
            module, *rest = shlex.split(re.split(r"  +|, | #", text)[0], comments=True)
            if re.fullmatch(r"[a-z_./]+", module):
                found.append((module, rest))
    return found


def test_commands_are_legal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    checked = 0
    for module, arguments in commands():
        if module.endswith(".sbatch"):
            assert (ROOT / module).exists(), module
        else:
            assert importlib.util.find_spec(module), module
        overrides = [x for x in with_search_path(arguments) if not x.startswith("-") and "," not in x]
        # What stands in capitals is the reader's to fill in.
        if module in RUNS and not any(re.search(r"=[A-Z_]+$|start=", x) for x in overrides):
            try:
                load_config(overrides, None)
            except ConfigError as error:
                if "optim.lrr=1" not in overrides and "config=typo.yaml" not in overrides:
                    raise AssertionError(f"{module} {overrides}: {error}") from error
            checked += 1
    assert checked > 15


def diffs() -> list[tuple[str, str, list[str]]]:
    """Page, file and lines of each diff in the pages; a diff has the file's name in its head."""
    found = []
    for page in PAGES:
        for text in re.findall(r"^```diff\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            head = re.match(r"--- (?:/dev/null|a/\S+)\n\+\+\+ b/(\S+)\n", text)
            assert head, f"{page.name}: a diff without the name of its file: {text[:80]}"
            found.append((page.name, head[1], text[head.end() :].splitlines()))
    return found


def runs_of(lines: list[str]) -> list[list[str]]:
    """Neighbouring lines that a diff leaves in the file, white space normalised; an ellipsis is any lines."""
    runs: list[list[str]] = [[]]
    for line in lines:
        if line[1:].strip() == "…":
            runs.append([])
        elif not line.startswith("-"):
            runs[-1].append(" ".join(line[1:].split()))
    return [run for run in runs if run]


def test_diffs_show_what_stands_in_the_tree() -> None:
    found = diffs()
    for page, name, lines in found:
        file, start = [" ".join(line.split()) for line in (ROOT / name).read_text().splitlines()], 0
        for run in runs_of(lines):
            starts = [i for i in range(start, len(file)) if file[i : i + len(run)] == run]
            assert starts, f"{page}: not in {name}, or not in this order:\n" + "\n".join(run)
            start = starts[0] + len(run)
    # One of each kind of addition that docs/extending.md works through.
    files = {name for _, name, _ in found}
    assert {"model/mixers/conv.py", "train/optim/optimizers/lion.py", "kernels/convolution/spec.py"} <= files
    assert {"train/optim/schedules/cosine.py", "model/hf/families/dbrx.py"} <= files
