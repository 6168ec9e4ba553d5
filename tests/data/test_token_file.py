import shutil
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import DataError
from data.merge import TokenFileWriter
from data.token_file import TokenFile, token_dtype

DOCUMENTS = [[1, 5, 6, 2], [1, 2], [1, 400, 7, 8, 9, 2]]


def write(prefix: Path, documents: list[list[int]], dtype: str, **changes: int) -> None:
    with TokenFileWriter(prefix, np.dtype(dtype), **changes) as writer:
        for document in documents:
            writer.add(np.array(document, dtype), 0)


def contents(file: TokenFile) -> list[list[int]]:
    return [file.document(index).tolist() for index in range(file.num_documents)]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write(tmp_path / "some.name", DOCUMENTS, "uint16")
    return tmp_path / "some.name"


@pytest.mark.parametrize(("dtype", "top"), [("uint16", 65_499), ("int32", 2_000_000_000)])
def test_megatron_reads_what_we_write(tmp_path: Path, megatron: ModuleType, dtype: str, top: int) -> None:
    documents = [*DOCUMENTS, [top]]
    write(tmp_path / "ours", documents, dtype)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [np.asarray(theirs[index]).tolist() for index in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert contents(TokenFile(tmp_path / "ours")) == documents


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8", "int64"])
@pytest.mark.parametrize("multimodal", [False, True])
def test_what_megatron_writes_is_read_here(
    tmp_path: Path, megatron: ModuleType, dtype: str, multimodal: bool
) -> None:
    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), np.dtype(dtype).type, multimodal=multimodal
    )
    # A document of two sequences, one without any, one of one sequence.
    for sequence in ([3, 1, 4], [1, 5]):
        builder.add_item(torch.tensor(sequence))
    builder.end_document()
    builder.end_document()
    builder.add_item(torch.tensor([9, 2]))
    builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    file = TokenFile(tmp_path / "theirs")
    assert file.dtype == np.dtype(dtype)
    assert contents(file) == [[3, 1, 4, 1, 5], [], [9, 2]]
    assert file.document_offsets.tolist() == [0, 5, 5, 7]
    assert file.document_offsets.dtype == np.int64


@given(st.lists(st.lists(st.integers(0, 60_000), max_size=7), max_size=6), st.data())
def test_the_stream_is_the_documents_end_to_end(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject
) -> None:
    prefix = tmp_path_factory.mktemp("stream") / "x"
    write(prefix, documents, "uint16", max_sequence_tokens=3)
    file = TokenFile(prefix)
    stream = [token for document in documents for token in document]
    assert contents(file) == documents
    assert file.num_tokens == len(stream)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert file.tokens(start, stop).tolist() == stream[start:stop]


def test_nothing_outside_the_stream_is_given(prefix: Path) -> None:
    file = TokenFile(prefix)
    for start, stop in ((-1, 2), (0, 13), (5, 4)):
        with pytest.raises(IndexError, match="of 12 in"):
            file.tokens(start, stop)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="document"):
            file.document(index)
    with pytest.raises(ValueError, match="read-only"):
        file.document(0)[0] = 1


def test_the_dtype_is_megatrons(megatron: ModuleType) -> None:
    for vocab_size in (400, 65_499, 65_500, 65_536, 200_000):
        assert token_dtype(vocab_size) == np.dtype(megatron.DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_length_but_the_right_one_is_refused(prefix: Path, suffix: str) -> None:
    path = prefix.with_name(prefix.name + suffix)
    whole = path.read_bytes()
    for size in [*range(len(whole)), len(whole) + 1, len(whole) + 2]:
        path.write_bytes((whole + b"\0\0")[:size])
        with pytest.raises(DataError, match=rf"{path}: .*found {size} bytes, expected \d+; prepare") as error:
            TokenFile(prefix)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert contents(TokenFile(prefix)) == DOCUMENTS


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, b"GIF", "it is no indexed dataset"),
        (9, struct.pack("<Q", 2), "version 2, expected 1"),
        (17, b"\x07", "dtype code 7"),
        (17, b"\x04", "damaged index: sequence 1 is at byte 8, expected 16"),
        (18, struct.pack("<Q", 1 << 60), "cut short"),
        (34, struct.pack("<i", -4), "sequence 0 has length -4"),
        (34, struct.pack("<i", 3), "sequence 1 is at byte 8, expected 6"),
        (34 + 12 + 8, struct.pack("<q", 2), "sequence 1 is at byte 2"),
        (34 + 12 + 24, struct.pack("<q", 1), "documents do not run"),
        (34 + 12 + 24 + 8, struct.pack("<q", 3), "documents do not run"),
        (34 + 12 + 24 + 8, struct.pack("<q", -(2**63)), "documents do not run"),
        (34 + 12 + 24 + 24, struct.pack("<q", 2), "documents do not run"),
    ],
)
def test_a_damaged_index_is_refused(prefix: Path, offset: int, value: bytes, words: str) -> None:
    path = prefix.with_name(prefix.name + ".idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        TokenFile(prefix)
    assert str(path) in str(error.value)


def test_another_dtype_is_refused(prefix: Path, tmp_path: Path) -> None:
    write(tmp_path / "wide", DOCUMENTS, "int32")
    shutil.copy(tmp_path / "wide.bin", prefix.with_name(prefix.name + ".bin"))
    with pytest.raises(DataError, match="too long: found 48 bytes, expected 24"):
        TokenFile(prefix)


def test_an_absent_file_is_named(prefix: Path) -> None:
    prefix.with_name(prefix.name + ".bin").unlink()
    with pytest.raises(DataError, match=r"some\.name\.bin: cannot open: No such file"):
        TokenFile(prefix)
