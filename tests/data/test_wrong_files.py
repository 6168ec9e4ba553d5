"""Sources, datasets and unfinished work, damaged somewhere: one error, or what an intact one gives."""

import bz2
import gzip
import json
import lzma
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow
import pytest
import torch
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from conf.errors import DataError
from data.card import CARD
from data.config import DataConfig
from data.loader import Loader
from data.prepare import Prepared, prepare
from tests.damage import damage

MakeConfig = Callable[..., DataConfig]
Folders = pytest.TempPathFactory
T = TypeVar("T")
TEXTS = [f"line {number} of a text that is read\nand one more\n" * (1 + number % 5) for number in range(40)]
ROWS = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
KINDS = {"plain": "jsonl", **dict.fromkeys(PACKED, "jsonl"), "parquet": "parquet"}

seeded = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def unless_refused(work: Callable[[], T]) -> T | None:
    """What comes out; None where it is refused in one line. Any other error fails."""
    try:
        return work()
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return None


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_source(path: Path, form: str) -> None:
    if form == "parquet":
        parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), path)
    else:
        path.write_bytes(PACKED.get(form, bytes)(ROWS))


@pytest.mark.prove
@seeded
@given(form=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**32))
def test_a_damaged_source_is_refused_or_gives_what_it_holds(
    form: str, seed: int, dataset: Prepared, make_config: MakeConfig, tmp_path_factory: Folders
) -> None:
    folder, draw = tmp_path_factory.mktemp("source"), random.Random(seed)
    source = folder / f"documents{form if form in PACKED else ''}"
    write_source(source, form)
    damage(source, draw)
    before = contents_of(folder)
    corpus = {"kind": KINDS[form], "source": str(source), "field": "text"}
    config = make_config(
        folder / "dataset",
        corpora={"documents": corpus},
        tokenizer={"vocab_size": 440, "model": str(dataset.directory / "tokenizer.model")},
        max_bad_documents=draw.choice([0, 1000]),
    )
    found = unless_refused(lambda: prepare(config, progress=False))
    assert (folder / "dataset").exists() == (found is not None)
    if found is not None and form != "parquet":
        # A packed file has a digest of its own, so what it gives is what was packed.
        lines = source.read_bytes() if form == "plain" else ROWS
        card = found.card.corpora["documents"]
        count = sum(1 for line in lines.split(b"\n") if line.strip())
        assert card.source_documents + card.bad + card.empty == count
    assert {name: content for name, content in contents_of(folder).items() if name in before} == before


@pytest.mark.prove
@seeded
@given(seed=st.integers(0, 2**32))
def test_a_damaged_dataset_is_refused_or_read_as_it_was(
    seed: int, dataset: Prepared, tmp_path_factory: Folders
) -> None:
    folder, draw = tmp_path_factory.mktemp("dataset") / "small", random.Random(seed)
    shutil.copytree(dataset.directory, folder)
    damage(draw.choice([*[folder / CARD] * 3, *sorted(folder.iterdir())]), draw)
    before = contents_of(folder)
    found = unless_refused(lambda: read(folder))
    if found is not None:
        torch.testing.assert_close(found, read(dataset.directory), rtol=0, atol=0)
    assert contents_of(folder) == before


def read(folder: Path) -> list[torch.Tensor]:
    """All that a run reads: every window, those held out, and what makes bits per byte of a loss."""
    loader = Loader(folder, sequence_length=32, seed=0, weights=None, vocab_size=440)
    loader.verify()
    card = loader.card.held_out
    batches = [*loader.batch(0, 64), *loader.held_out(0, loader.held_out_rows)]
    return [*batches, torch.tensor([card.bytes, card.tokens, card.documents])]


@pytest.mark.prove
@seeded
@given(seed=st.integers(0, 2**32))
def test_damaged_work_is_refused_or_finished_to_the_same_dataset(
    seed: int, unfinished: Path, dataset: Prepared, make_config: MakeConfig, tmp_path_factory: Folders
) -> None:
    folder, draw = tmp_path_factory.mktemp("work"), random.Random(seed)
    shutil.copytree(unfinished, folder / "small.partial")
    files = [path for path in (folder / "small.partial").rglob("*") if path.is_file()]
    damage(draw.choice(sorted(files)), draw)
    config = make_config(folder / "small")
    if unless_refused(lambda: prepare(config, progress=False, shard_bytes=4_000)) is not None:
        assert contents_of(folder / "small") == contents_of(dataset.directory)


@pytest.fixture(scope="module")
def unfinished(make_config: MakeConfig, tmp_path_factory: Folders) -> Path:
    """The work on a dataset that was killed while its last file was merged."""
    folder = tmp_path_factory.mktemp("unfinished") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.prepare._publish", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(make_config(folder), progress=False, shard_bytes=4_000)
    return folder.with_name("small.partial")


def killed(*_: object) -> None:
    raise KeyboardInterrupt
