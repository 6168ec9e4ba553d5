"""Which checkpoint of a run is read, and in which layout, told before torch is imported."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import CheckpointError, ConfigError
from data.card import read_card
from tests.train.conftest import Corpus
from tests.train.saved_runs import save_run
from train.checkpoint.records import read_record, write_record
from train.config.reading import open_to_read, split_layout
from train.evaluate import main as evaluate
from train.export import main as export
from train.sample import main as sample

STEPS = (4, 8, 12)
# What starts slowly must not be there when a step is refused.
WATCH = """
import runpy, sys
sys.argv = ["x", *{arguments!r}]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as ended:
    print(ended.code, *({{"torch", "transformers"}} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "run"
    save_run(corpus.overrides(directory), STEPS, read_card(corpus.dataset).tokenizer.digest)
    return directory


def damage(run: Path, step: int) -> Path:
    """Flips a bit of a checkpoint."""
    path = run / "checkpoints" / f"step_{step:08d}"
    file = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return path


def rows_of(text: str) -> dict[str, str]:
    """The rows of a printed table."""
    cells = (line.split("│") for line in text.splitlines() if line.startswith("│"))
    return {name.strip(): value.strip() for _, name, value, _ in cells}


def test_a_step_is_the_one_that_is_scored_and_sampled(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses, texts = {}, {}
    for step in (None, *STEPS):
        more = [] if step is None else [f"step={step}"]
        evaluate([f"run={run}", "rows=2", *more])
        table = rows_of(capsys.readouterr().out)
        assert table["step"] == str(step or STEPS[-1])
        losses[step] = table["loss (nats per token)"]
        sample([f"run={run}", "tokens=12", *more])
        texts[step] = capsys.readouterr().out
    assert losses[None] == losses[12]
    assert texts[None] == texts[12]
    assert len(set(losses.values())) == len(set(texts.values())) == len(STEPS)


def test_a_step_is_the_one_that_is_exported(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from model.hf.files import SINGLE

    found = {}
    for step in STEPS:
        export([f"run={run}", f"to={tmp_path}/{step}", "model_type=weft", f"step={step}"])
        found[step] = load_file(tmp_path / str(step) / SINGLE)
    export([f"run={run}", f"to={tmp_path}/newest", "model_type=weft"])
    newest = load_file(tmp_path / "newest" / SINGLE)
    assert all(torch.equal(newest[name], x) for name, x in found[12].items())
    assert not torch.equal(found[4]["embed.weight"], found[8]["embed.weight"])


@pytest.mark.parametrize("module", ["train.evaluate", "train.sample", "train.export"])
def test_an_unknown_step_is_answered_at_once_with_those_there_are(run: Path, module: str) -> None:
    arguments = [f"run={run}", "step=5", *(["to=nowhere"] if module == "train.export" else [])]
    command = [sys.executable, "-c", WATCH.format(module=module, arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["64"], done.stderr
    assert f"error: step: {run}/checkpoints has no checkpoint of step 5; there are 4, 8, 12;" in done.stderr


def test_a_damaged_step_is_refused_and_no_other_taken(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    save_run(corpus.overrides(directory), STEPS, read_card(corpus.dataset).tokenizer.digest)
    names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    path = damage(directory, 8)
    for command, more in ((evaluate, "rows=2"), (sample, "tokens=2"), (export, f"to={tmp_path}/to")):
        with pytest.raises(CheckpointError, match=rf"{path}: damaged: .*no other one is taken"):
            command([f"run={directory}", "step=8", more])
    # The newest good one is as it was, also where the newest of all is bad.
    damage(directory, 12)
    evaluate([f"run={directory}", "rows=2"])
    said = capsys.readouterr().out
    assert "step_00000012 skipped" in said
    assert rows_of(said)["step"] == "4"
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == names
    assert not (tmp_path / "to").exists()


def test_what_was_set_aside_is_said_of_its_step(corpus: Corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    save_run(corpus.overrides(directory), (4, 8))
    (directory / "checkpoints" / "step_00000008").rename(directory / "checkpoints" / "step_00000008.corrupt")
    with pytest.raises(ConfigError, match=r"step 8 \(step_00000008.corrupt: set aside .*there are 4;"):
        open_to_read(str(directory), 8, (), 1)


def with_layout(run: Path, directory: Path, layout: Mapping[str, Any]) -> str:
    """The config of a run as another layout trained it."""
    config = read_record(run / "config.json") or {}
    config["parallel"] |= layout
    directory.mkdir(exist_ok=True)
    write_record(directory / "config.json", config)
    return str(directory)


def test_one_process_has_the_whole_model_and_several_the_layout(run: Path, tmp_path: Path) -> None:
    given = {"data": "zero", "pp": 2, "cp": 2, "ep": 2, "recompute": "full", "compile": True, "prefetch": 1}
    directory = with_layout(run, tmp_path, given)
    alone = open_to_read(directory, None, (), 1).parallel
    assert alone.degrees(1) == (1, 1, 1, 1, 1, 1)
    read = open_to_read(directory, None, (), 4).parallel
    assert read.degrees(4) == (2, 1, 1, 2, 1, 2)
    assert (read.data, read.recompute, read.compile, read.prefetch) == ("fsdp", "none", False, 0)
    typed = open_to_read(directory, None, ["parallel.pp=1", "parallel.ep=4"], 4).parallel
    assert typed.degrees(4) == (1, 1, 2, 2, 1, 4)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("parallel.tp=3", "parallel.tp: 3 does not divide the 2 processes started; legal values are 1, 2"),
        ("parallel.epp=2", "parallel.epp: unknown key; did you mean parallel.pp?"),
        ("parallel.ep=two", "parallel.ep: input should be a valid integer"),
        ("parallel.data=zero", "parallel.data: is about training"),
        ("parallel.zero.stage=3", "parallel.zero.stage: is about training"),
    ],
)
def test_a_typed_key_that_cannot_be_is_named(run: Path, typed: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_to_read(str(run), None, [typed], 2)
    assert str(caught.value).startswith(says)


degrees = st.sampled_from([1, 2, 3, 4, 8])


@settings(max_examples=60)
@given(
    layout=st.fixed_dictionaries(
        dict.fromkeys(("pp", "cp", "tp", "ep", "dp_replicate"), degrees)
        | {"dp_shard": st.sampled_from([-1, -1, 1, 2, 8])}
        | {"ep_dispatch": st.sampled_from(["all_to_all", "all_to_all", "deepep"])}
    ),
    size=st.integers(1, 12),
)
def test_a_layout_that_does_not_fit_is_answered_by_keys_that_do(
    run: Path, tmp_path_factory: pytest.TempPathFactory, layout: dict[str, Any], size: int
) -> None:
    directory = with_layout(run, tmp_path_factory.getbasetemp() / "layouts", layout)
    try:
        found = open_to_read(directory, None, (), size)
    except ConfigError as error:
        (violation,) = error.violations
        assert violation.key == "parallel"
        assert f"{size} processes started" in violation.message
        keys = shlex.split(violation.message.rpartition("; give ")[2])
        assert keys
        assert split_layout(keys)[0] == []
        found = open_to_read(directory, None, keys, size)
    assert found.parallel.degrees(size).size == size
    assert found.moe.num_experts % found.parallel.ep == 0


def test_what_is_advised_spreads_the_experts_if_they_were(run: Path, tmp_path: Path) -> None:
    for ep, advice in ((1, "parallel.tp=1"), (8, "parallel.tp=1 parallel.ep=2")):
        directory = with_layout(run, tmp_path, {"tp": 8, "ep": ep})
        with pytest.raises(ConfigError) as caught:
            open_to_read(directory, None, (), 2)
        assert str(caught.value).endswith(f"; give {advice}")
        assert "\n" not in str(caught.value)
