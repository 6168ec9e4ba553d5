"""Ranks of one run that differ start nothing, and the odd one is named; so are numbers of no use."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh.rendezvous import difference
from tests.train.conftest import Corpus
from tests.train.runs import free_port, log_path, run_to_end, spawn, train_here
from train.checkpoint.store import CheckpointStore
from train.export import main as export
from train.loop.same_ranks import code_digest

ROOT = Path(__file__).parents[2]
FEW = ("train.steps=2", "train.final_rows=8")


def codes_and_errors(of_rank: Sequence[list[str]]) -> tuple[list[int | None], list[list[str]]]:
    """Exit codes and error lines of ranks that were started by commands of their own."""
    port, size = free_port(), len(of_rank)
    logs = [f"{log_path(of_rank[0])}.{rank}" for rank in range(size)]
    ranks = [spawn(train_here, own, rank, size, port, "", logs[rank]) for rank, own in enumerate(of_rank)]
    for process in ranks:
        process.join(120)
        process.kill()
    said = [Path(log).read_text().splitlines() for log in logs]
    return [process.exitcode for process in ranks], [
        [line for line in lines if line.startswith("error: ")] for lines in said
    ]


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (("optim.lr=0.02",), "optim.lr", "rank 1 has 0.02, rank 0 and 1 more have 0.01; start every rank"),
        (("train.global_batch=12",), "train.global_batch", "rank 1 has 12, rank 0 and 1 more have 6"),
        (("parallel.ep=3",), "parallel.ep", "rank 1 has 3, rank 0 and 1 more have 1"),
    ],
)
def test_another_config_is_named_on_every_rank(
    corpus: Corpus, tmp_path: Path, more: tuple[str, ...], key: str, said: str
) -> None:
    same = corpus.overrides(
        tmp_path / "run", *FEW, "train.global_batch=6", "moe.num_experts=3", "moe.top_k=1"
    )
    codes, errors = codes_and_errors([same, [*same, *more], same])
    assert codes == [64, 64, 64]
    for lines in errors:
        assert lines[0].startswith(f"error: {key}: {said}"), errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_dataset_is_named_on_every_rank(corpus: Corpus, tmp_path: Path) -> None:
    # One path, other files behind it: a node with a mount of its own.
    for name in ("shared", "local"):
        shutil.copytree(corpus.dataset, tmp_path / name)
    card = json.loads((tmp_path / "local" / "card.json").read_text())
    del card["sha256"]
    card["held_out"]["bin_digest"] = "0" * 32
    (tmp_path / "local" / "card.json").write_text(json.dumps(card))
    overrides = corpus.overrides(tmp_path / "run", *FEW)
    port, logs = free_port(), [f"{log_path(overrides)}.{rank}" for rank in (0, 1)]
    view = tmp_path / "view"
    overrides = [*overrides, f"data.directory={view}"]
    view.symlink_to(tmp_path / "shared")
    ranks = [spawn(train_here, overrides, 0, 2, port, "", logs[0])]
    ranks += [spawn(train_behind, overrides, str(tmp_path / "local"), port, logs[1])]
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [64, 64]
    for log in logs:
        (error,) = [line for line in Path(log).read_text().splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: data.directory: {view}: rank 1 has ")
        assert "every node must see the same files" in error


def train_behind(overrides: list[str], dataset: str, port: int, log: str) -> None:
    """Rank 1 of 2, which sees other files under the path of the dataset."""
    from train.loop import run

    opened = run.Loader
    run.Loader = lambda path, **options: _renamed(opened(Path(dataset), **options), path)
    train_here(overrides, 1, 2, port, "", log)


def _renamed(loader, path: Path):
    loader.directory = path
    return loader


def test_one_changed_letter_is_other_code(tmp_path: Path) -> None:
    for folder in ("conf", "data", "kernels", "model", "parallel", "train"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    same = code_digest(ROOT)
    assert code_digest(tmp_path) == same
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.py").touch()
    assert code_digest(tmp_path) == same
    for name in ("conf/optim/adamw.yaml", "kernels/norm/reference.py"):
        path = tmp_path / name
        text = path.read_text()
        # As long as before.
        path.write_text(text.replace("a", "b", 1))
        assert code_digest(tmp_path) != same
        path.write_text(text)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=7))
def test_the_odd_ones_are_those_without_the_most_common_value(values: list[str]) -> None:
    found = difference(dict(enumerate(values)))
    if len(set(values)) == 1:
        assert found is None
        return
    assert found is not None
    most = max(values.count(value) for value in values)
    standard = next(value for value in values if values.count(value) == most)
    odd = [rank for rank, value in enumerate(values) if value != standard]
    assert values[found.standard] == standard
    assert found.rank == odd[0]
    assert found.said.split()[1:-1] == [f"{rank}," for rank in odd[:-1]] + [str(odd[-1])]


def test_weights_that_are_not_finite_start_nothing(corpus: Corpus, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run_to_end(corpus.overrides(directory, *FEW)) == 0
    weights = tmp_path / "weights"
    export([f"run={directory}", f"to={weights}", "model_type=weft"])
    _spoil_export(weights, math.inf)
    _spoil_checkpoint(directory, math.nan)
    for overrides, size in (
        (corpus.overrides(directory, *FEW), 1),
        # Only one of the two ranks has the bad number.
        (corpus.overrides(directory, *FEW, "parallel.tp=2"), 2),
        (corpus.overrides(tmp_path / "next", *FEW, f"train.start={weights}"), 1),
    ):
        assert run_to_end(overrides, size) == 66
        errors = {x for x in log_path(overrides).read_text().splitlines() if x.startswith("error: ")}
        log_path(overrides).unlink()
        assert len(errors) == 1
        assert re.search(r"numbers that are not finite in (model\.)?embed\.weight;", errors.pop())


def _spoil_export(weights: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    (path,) = weights.glob("*.safetensors")
    tensors = load_file(path)
    tensors["embed.weight"].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})


def _spoil_checkpoint(run: Path, value: float) -> None:
    """The same checkpoint with one bad number, its digests right: as a faulty device would have saved it."""
    store = CheckpointStore(run / "checkpoints", keep=2)
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(run / "checkpoints" / "step_00000002").read_metadata().state_dict_metadata
    flat = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype)
        for key, meta in stored.items()
        if hasattr(meta, "size")
    }
    nested: dict = {}
    for key, tensor in flat.items():
        nested[key] = tensor
    loaded = store.load_latest(nested, partial=tuple(flat))
    assert loaded is not None
    next(tensor for key, tensor in nested.items() if key.endswith("model.embed.weight")).view(-1)[-1] = value
    store.save(2, nested, loaded.extra)
