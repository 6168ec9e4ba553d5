"""What goes wrong outside the program ends a run with one line, and nothing is lost."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest

from tests.train.conftest import Corpus
from tests.train.runs import log_path, metrics_of, run_to_end, spawn, train_here
from train.checkpoint.records import read_record, write_record
from train.config.load import load_config
from train.export import main as train_export


def errors_of(overrides: list[str]) -> str:
    lines = [line for line in log_path(overrides).read_text().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in log_path(overrides).read_text()
    return "\n".join(lines)


@pytest.fixture
def damaged(corpus: Corpus, tmp_path: Path) -> Corpus:
    copy = tmp_path / "dataset"
    shutil.copytree(corpus.dataset, copy)
    return Corpus(corpus.tree, copy)


def test_a_dataset_that_was_not_prepared(corpus: Corpus, tmp_path: Path) -> None:
    overrides = corpus.overrides(tmp_path / "run", f"data.directory={tmp_path}/missing")
    assert run_to_end(overrides) == 65
    assert "run python -m data.prepare" in errors_of(overrides)


def test_a_token_file_cut_short(damaged: Corpus, tmp_path: Path) -> None:
    path = damaged.dataset / "documents.bin"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 10)
    overrides = damaged.overrides(tmp_path / "run")
    assert run_to_end(overrides) == 65
    said = errors_of(overrides)
    assert str(damaged.dataset) in said
    assert str(size) in said
    assert str(size - 10) in said


def test_a_token_beyond_the_vocabulary(damaged: Corpus, tmp_path: Path) -> None:
    path = damaged.dataset / "documents.bin"
    content = bytearray(path.read_bytes())
    content[: len(content)] = b"\xff\x01" * (len(content) // 2)
    path.write_bytes(content)
    overrides = damaged.overrides(tmp_path / "run")
    assert run_to_end(overrides) == 65
    assert f"{path}: token " in errors_of(overrides)


def test_a_tokenizer_other_than_the_datas(damaged: Corpus, tmp_path: Path) -> None:
    path = damaged.dataset / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"\x00")
    overrides = damaged.overrides(tmp_path / "run")
    assert run_to_end(overrides) == 65
    said = errors_of(overrides)
    assert str(damaged.dataset) in said
    assert "sha256" in said


def test_data_other_than_the_runs(corpus: Corpus, damaged: Corpus, tmp_path: Path) -> None:
    overrides = corpus.overrides(tmp_path / "run", "train.steps=4")
    assert run_to_end(overrides) == 0
    card = json.loads((damaged.dataset / "card.json").read_text())
    del card["sha256"]
    card["held_out"]["bin_digest"] = "0" * 32
    (damaged.dataset / "card.json").write_text(json.dumps(card))
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run", moved)
    config = read_record(moved / "config.json") or {}
    config["data"]["directory"] = str(damaged.dataset)
    write_record(moved / "config.json", config)
    other = damaged.overrides(moved, "train.steps=4")
    assert run_to_end(other) == 64
    assert "data.directory" in errors_of(other)


def test_a_corpus_that_the_config_does_not_name_is_named(damaged: Corpus, tmp_path: Path) -> None:
    card = json.loads((damaged.dataset / "card.json").read_text())
    del card["sha256"]
    card["corpora"]["more"] = card["corpora"]["documents"]
    (damaged.dataset / "card.json").write_text(json.dumps(card))
    for ending in ("bin", "idx"):
        shutil.copy(damaged.dataset / f"documents.{ending}", damaged.dataset / f"more.{ending}")
    overrides = damaged.overrides(tmp_path / "run", "train.steps=1", "train.final_rows=1")
    assert run_to_end(overrides) == 0
    said = log_path(overrides).read_text()
    assert f"{damaged.dataset}: passes over more, which data.corpora does not name" in said


def test_checkpoints_that_cannot_be_written_show_before_the_first_step(
    corpus: Corpus, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("/proc")
    overrides = corpus.overrides(tmp_path / "run")
    assert run_to_end(overrides) == 74
    assert "error: " in log_path(overrides).read_text()
    assert "no checkpoint can be saved" in log_path(overrides).read_text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_directory_that_cannot_be_made(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    overrides = corpus.overrides(tmp_path / "file" / "run")
    log = tmp_path / "log"
    process = spawn(train_logged, overrides, str(log))
    process.join(60)
    assert process.exitcode == 74
    assert str(tmp_path / "file" / "run") in log.read_text()
    assert "Traceback" not in log.read_text()


def train_logged(overrides: list[str], log: str) -> None:
    train_here(overrides, log=log)


def train_on_a_full_disk(overrides: list[str], limit: int) -> None:
    # A file that may not grow: the kernel refuses the write as it does on a full disk.
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train_here(overrides)


def test_a_full_disk_ends_the_run_and_loses_nothing(corpus: Corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, "train.steps=8", "checkpoint.every=4")
    process = spawn(train_on_a_full_disk, overrides, 60_000)
    process.join(60)
    assert process.exitcode == 74
    said = errors_of(overrides)
    assert str(directory) in said
    assert not list((directory / "checkpoints").glob("*.tmp"))
    assert [line["step"] for line in metrics_of(directory)] == [1, 2, 3, 4]
    assert run_to_end(overrides) == 0


def train_in_little_memory(overrides: list[str], limit: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    train_here(overrides)


def test_too_little_memory_is_one_line_whose_advice_is_taken(corpus: Corpus, tmp_path: Path) -> None:
    overrides = corpus.overrides(tmp_path / "run", "model.width=999999")
    process = spawn(train_in_little_memory, overrides, 4 << 30)
    process.join(120)
    assert process.exitcode == 64
    said = errors_of(overrides)
    assert said.startswith("error: rank 0: out of memory: ")
    for advised in ("train.micro_batch=1", "parallel.recompute=full"):
        assert advised in said
        assert load_config([*overrides, advised], 1)


def train_with_a_poisoned_weight(overrides: list[str]) -> None:
    import torch

    from train.loop import run

    build = run.build_state

    def poisoned(*arguments):
        state = build(*arguments)
        with torch.no_grad():
            state.built.whole.head.weight[3, 0] = float("nan")
        return state

    run.build_state = poisoned
    train_here(overrides)


def train_with_a_poisoned_step(overrides: list[str]) -> None:
    import torch

    from train.loop import run

    step = run.train_step

    def poisoned(state, *arguments):
        if state.step == 4:
            with torch.no_grad():
                state.built.whole.head.weight[3, 0] = float("nan")
        return step(state, *arguments)

    run.train_step = poisoned
    train_here(overrides)


def test_the_advice_after_non_finite_steps_is_taken(corpus: Corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    steps = ("train.steps=6", "checkpoint.every=2", "train.max_skipped=0")
    overrides = corpus.overrides(directory, *steps)
    process = spawn(train_with_a_poisoned_step, overrides)
    process.join(60)
    assert process.exitcode == 70
    said = errors_of(overrides)
    export, start, goes_on = (
        re.findall(pattern, said)[0]
        for pattern in (r"train\.export ([^)]*)\)", r"train\.start=[^)]*", r"train\.max_skipped=\d+")
    )
    train_export(export.split())
    again = corpus.overrides(tmp_path / "another", *steps, start, "optim.lr=0.0001")
    assert run_to_end(again) == 0
    assert run_to_end([*overrides, goes_on]) == 0


def test_non_finite_steps_touch_nothing_and_stop_the_run(corpus: Corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    overrides = corpus.overrides(directory, "train.max_skipped=2")
    process = spawn(train_with_a_poisoned_weight, overrides)
    process.join(60)
    assert process.exitcode == 70
    said = errors_of(overrides)
    assert "the weights are those before; start again in another run.dir" in said
    lines = metrics_of(directory)
    assert [line["optimizer/skipped"] for line in lines] == [1, 1, 1]
    assert [line["loss"] for line in lines] == [None] * 3
