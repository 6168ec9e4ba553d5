"""Token files of Megatron where they lie: the samples of the same documents, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet, table

from conf.compose import validate
from conf.errors import ConfigError, DataError
from data.config import DataConfig
from data.loader import Loader
from data.prepare import prepare
from data.token_file import TokenFile
from data.token_stream import TokenStream
from tests.qwen_like import write_qwen_like

Write = Callable[..., Path]
TEXTS = [f"document {number} of {number * 37 % 101} words\n" * (1 + number % 4) for number in range(60)]
LENGTH = 32


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_like(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def write(megatron: ModuleType) -> Write:
    """Writes a pair by Megatron-Core itself."""

    def pair(prefix: Path, documents: list[list[int]], dtype: Any = np.int32) -> Path:
        builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents:
            builder.add_item(torch.tensor(document, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        return prefix

    return pair


def config_of(directory: Path, tokenizer: Path, held_out: float = 0.0, **corpora: Any) -> DataConfig:
    settings = {
        "directory": str(directory),
        "sequence_length": LENGTH,
        "corpora": corpora,
        "tokenizer": {"vocab_size": 400, "model": str(tokenizer)},
        "held_out": held_out,
        "workers": 0,
        "max_bad_documents": 0,
        "verify": True,
    }
    return validate(DataConfig, settings)


def loader_of(config: DataConfig) -> Loader:
    found = Loader(
        config.directory,
        sequence_length=LENGTH,
        seed=3,
        weights=config.weights,
        vocab_size=400,
        epochs=config.epochs,
    )
    found.verify()
    return found


def test_one_corpus_in_every_form_is_one_stream(qwen: Path, write: Write, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "rows.jsonl").write_bytes(rows)
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd.compress(rows))
    parquet.write_table(table({"text": TEXTS}), tmp_path / "rows.parquet")
    loaders = {}
    for name in ("rows.jsonl", "rows.jsonl.zst", "rows.parquet"):
        # The ending says the kind.
        config = config_of(tmp_path / f"out {name}", qwen, mine={"source": str(tmp_path / name)})
        prepare(config, progress=False)
        loaders[name] = loader_of(config)
    whole = TokenFile(tmp_path / "out rows.jsonl" / "mine")
    documents = [whole.document(index).tolist() for index in range(whole.num_documents)]
    pairs = write(tmp_path / "a", documents[:21], np.uint16), write(tmp_path / "b", documents[21:], np.int64)
    source = " ".join(map(str, pairs))
    config = config_of(tmp_path / "out", qwen, mine={"kind": "megatron", "source": source})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[ab].*")}
    prepare(config, progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("[ab].*")} == before
    assert not (tmp_path / "out" / "mine.bin").exists()
    loaders["megatron"] = loader_of(config)
    expected = loaders.pop("rows.jsonl")
    for name, loader in loaders.items():
        for cursor in (0, 7, 1000):
            for ours, theirs in zip(loader.batch(cursor, 6), expected.batch(cursor, 6), strict=True):
                assert torch.equal(ours, theirs), name


def test_what_is_held_out_is_not_trained_on(qwen: Path, write: Write, tmp_path: Path) -> None:
    documents = [[*range(number, number + 5 + number % 9), 370] for number in range(200)]
    write(tmp_path / "a", documents)
    config = config_of(tmp_path / "out", qwen, 0.2, mine={"kind": "megatron", "source": str(tmp_path / "a")})
    card = prepare(config, progress=False).card
    held = TokenFile(tmp_path / "out" / "held_out")
    apart = [held.document(index).tolist() for index in range(held.num_documents)]
    stream = loader_of(config)._files["mine"]
    kept = [stream.document(index).tolist() for index in range(stream.num_documents)]
    assert 20 < len(apart) < 60
    assert sorted(apart + kept) == sorted(documents)
    assert [document for document in documents if document not in apart] == kept
    assert card.held_out.given_bytes > 0
    assert (card.corpora["mine"].documents, card.corpora["mine"].passed_over) == (len(kept), [])


@given(
    lengths=st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=4),
    draw=st.data(),
)
def test_a_stream_is_its_documents(lengths: list[list[int]], draw: st.DataObject) -> None:
    files, documents, at = [], [], 0
    for index, own in enumerate(lengths):
        file = TokenFile.__new__(TokenFile)
        file.bin_path, file.dtype = Path(str(index)), np.dtype(np.int32)
        file.document_offsets = np.concatenate([[0], np.cumsum(own, dtype=np.int64)]).astype(np.int64)
        file.num_documents, file.num_tokens = len(own), sum(own)
        file._tokens = np.arange(at, at + sum(own), dtype=np.int32)
        at += sum(own)
        files.append(file)
        documents += [file.document(number).tolist() for number in range(len(own))]
    left_out = draw.draw(st.lists(st.sampled_from(range(len(documents))), unique=True)) if documents else []
    stream = TokenStream(files, np.array(sorted(left_out), np.int64))
    kept = [document for number, document in enumerate(documents) if number not in left_out]
    assert [stream.document(number).tolist() for number in range(stream.num_documents)] == kept
    flat = [token for document in kept for token in document]
    start = draw.draw(st.integers(0, len(flat)))
    stop = draw.draw(st.integers(start, len(flat)))
    assert stream.tokens(start, stop).tolist() == flat[start:stop]
    if flat:
        path, index = stream.where(len(flat) - 1)
        assert files[int(path.name)].tokens(index, index + 1).tolist() == flat[-1:]


def test_blends_and_folders(qwen: Path, write: Write, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pairs = [write(tmp_path / "in" / name, [[1, 2, 3, 370]] * 40) for name in ("a", "b.c")]
    source = f"30 {pairs[0]} 70 {pairs[1]}"
    config = config_of(tmp_path / "out", qwen, mine={"kind": "megatron", "source": source, "weight": 1.0})
    assert config.weights == {"mine_0": 30.0, "mine_1": 70.0}
    card = prepare(config, progress=False).card
    assert [card.corpora[name].tokens for name in ("mine_0", "mine_1")] == [160, 160]
    folder = config_of(tmp_path / "two", qwen, mine={"kind": "megatron", "source": str(tmp_path / "in")})
    files = prepare(folder, progress=False).card.corpora["mine"].files
    assert [Path(file.prefix).name for file in files] == ["a", "b.c"]


def test_bad_token_files_are_one_line(qwen: Path, write: Write, tmp_path: Path) -> None:
    def refused(match: str, directory: str = "new", source: str = "a") -> None:
        mine = {"kind": "megatron", "source": str(tmp_path / source)}
        with pytest.raises(DataError, match=match) as error:
            prepare(config_of(tmp_path / directory, qwen, mine=mine), progress=False)
        assert "\n" not in str(error.value)

    write(tmp_path / "a", [[1, 2, 3, 370]] * 40)
    refused(r"data\.corpora\.mine\.source=.*none: .*none\.idx is not there", source="none")
    write(tmp_path / "high", [[1, 400, 370]] * 40)
    refused(r"high\.bin: document 0 holds id 400, and data\.tokenizer\.model has ids 0 to 373", source="high")
    whole = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(whole[:-9])
    refused(r"a\.idx: cut short: found \d+ bytes, expected \d+")
    (tmp_path / "a.idx").write_bytes(whole)
    mine = {"kind": "megatron", "source": str(tmp_path / "a")}
    with pytest.raises(
        ConfigError, match="model is missing: name the tokenizer that wrote the tokens of mine"
    ):
        validate(
            DataConfig,
            config_of(tmp_path / "x", qwen, mine=mine).model_dump() | {"tokenizer": {"vocab_size": 400}},
        )
    config = config_of(tmp_path / "out", qwen, mine=mine)
    prepare(config, progress=False)
    write(tmp_path / "a", [[1, 2, 3, 370]] * 41)
    with pytest.raises(DataError, match=r"a\.idx: found 41 documents.*the files changed"):
        loader_of(config)


def test_documents_without_the_end_token_are_said(qwen: Path, write: Write, tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3]] * 30 + [[1, 2, 370]] * 10)
    mine = {"kind": "megatron", "source": str(tmp_path / "a.bin")}
    card = prepare(config_of(tmp_path / "out", qwen, mine=mine), progress=False).card
    assert card.corpora["mine"].passed_over == [
        "end tokens: 30 of 40 documents do not end with the one of the tokenizer"
    ]
