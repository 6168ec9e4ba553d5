import gzip
import json
import lzma
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from conf.compose import CONF_DIR
from conf.errors import DataError
from data.config import CorpusConfig
from data.documents import Document, fault_of, read_documents
from data.files import find_files


def corpus(kind: str, source: Path | str, **changes: Any) -> CorpusConfig:
    return CorpusConfig.model_validate({"kind": kind, "source": str(source)} | changes)


def read(kind: str, source: Path | str, **changes: Any) -> list[Document]:
    return list(read_documents("mine", corpus(kind, source, **changes)))


@given(st.binary(max_size=40))
def test_a_fault_is_a_nul_or_undecodable(content: bytes) -> None:
    try:
        content.decode("utf-8")
        decodes = True
    except UnicodeDecodeError:
        decodes = False
    assert bool(fault_of(content)) == (b"\0" in content or not decodes)


def test_faults_name_the_byte() -> None:
    assert fault_of(b"ab\0c") == "binary: NUL at byte 2"
    assert fault_of("né".encode("latin-1")) == "invalid UTF-8 at byte 1 (0xe9)"
    assert fault_of(b"x\xed\xa0\x80") == "invalid UTF-8 at byte 1 (0xed)"  # a lone surrogate
    assert fault_of(b"\xef\xbb\xbfbom\r\nmixed\rnew\nlines") == ""


def test_a_tree_is_read_sorted_and_as_it_is(tmp_path: Path) -> None:
    for name in ("b/z.py", "a/é.py", ".git/config.py", "a/__pycache__/c.py", "b/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"\ufeff{name}\r\n".encode())
    (tmp_path / "b" / "empty.py").touch()
    found = read("code", tmp_path, suffixes=[".py"])
    names = [str(Path(origin).relative_to(tmp_path)) for _, origin, _ in found]
    assert names == ["a/é.py", "b/empty.py", "b/z.py"]
    assert [content for content, _, _ in found] == [
        "\ufeffa/é.py\r\n".encode(),
        b"",
        b"\xef\xbb\xbfb/z.py\r\n",
    ]
    assert len(read("text", tmp_path)) == 4
    assert len(read("text", f"{tmp_path}/*/*.md")) == 1


def test_the_standard_library_has_only_its_own_source() -> None:
    files = find_files("lib", corpus("code", "stdlib")).paths
    root = Path(sysconfig.get_path("stdlib"))
    assert len(files) > 1000
    assert root / "json" / "decoder.py" in files
    assert all(path.suffix == ".py" and "site-packages" not in path.parts for path in files)
    assert files == sorted(files)


def test_an_unusable_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.corpora\.mine\.source=.*/gone: no such file"):
        read("text", tmp_path / "gone")
    with pytest.raises(DataError, match=r"found no file ending in \.py"):
        read("code", tmp_path, suffixes=[".py"])
    with pytest.raises(DataError, match="found no file"):
        read("text", f"{tmp_path}/*.txt")


def test_jsonl_lines_are_documents_and_broken_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"text": "one\u2028é", "id": 1}, ensure_ascii=False).encode(),
        b'{"text": "cut',
        b"",
        b'{"body": "other"}',
        b'{"text": "\\ud800"}',
        b'{"text": ["list"]}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "nul \\u0000"}',
        b'{"text": ""}',
        b'{"text": null}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines))
    found = read("jsonl", path, field="text")
    assert found[0] == ("one\u2028é".encode(), f"{path}:1", "")
    faults = {int(origin.rsplit(":", 1)[1]): fault for _, origin, fault in found if fault}
    assert faults[2].startswith("not JSON")
    assert faults[4] == "no field 'text'; found body"
    assert faults[5] == "lone surrogate at character 0"
    assert faults[6] == "field 'text' is list, not text"
    assert faults[7] == "a JSON list, not an object"
    assert faults[8].startswith("not JSON")
    assert faults[9] == "binary: NUL at byte 4"
    assert faults[12].startswith("not JSON")
    assert sorted(faults) == [2, 4, 5, 6, 7, 8, 9, 12]
    assert [content for content, _, fault in found if not fault][1:] == [b"", b""]


@pytest.mark.parametrize(
    ("ending", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstd.compress)]
)
def test_a_cut_compressed_file_is_an_error_that_names_the_line(
    ending: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    # Two streams in one file, as parallel compressors and `cat` make them.
    rows = b"".join(b'{"text": "%d"}\n' % number for number in range(2500))
    whole = compress(rows) + compress(rows)
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(whole)
    assert len(read("jsonl", path, field="text")) == 5000
    for damaged in (whole[: len(whole) * 3 // 4], whole[:-1], whole[:20] + b"\xff" + whole[21:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{path}:\d+: cannot read: .*fetch it again"):
            read("jsonl", path, field="text")


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    texts = ["one", "", None, "vier é", "nul \0"]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(5)), "text": texts}), path)
    found = read("parquet", path, field="text")
    assert [content for content, _, _ in found] == [b"one", b"", b"", "vier é".encode(), b"nul \0"]
    assert found[3][1] == f"{path}:4"
    assert found[4][2] == "binary: NUL at byte 4"
    assert read("parquet", path, field="body")[0][2] == "no field 'body'; found id, text"


def test_a_cut_parquet_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=str(path)) as error:
        read("parquet", path, field="text")
    assert "\n" not in str(error.value)


def test_a_hub_dataset_is_read_and_an_offline_hub_is_one_line(tmp_path: Path) -> None:
    # In a process of its own: the library reads the environment once, when it is imported.
    copy = tmp_path / "copy"
    copy.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), copy / "train.parquet")
    code = f"""
from conf.errors import DataError
from data.config import CorpusConfig
from data.documents import read_documents
def read(source, field="text"):
    corpus = CorpusConfig(kind="hub", source=source, field=field, split="train")
    return list(read_documents("mine", corpus))
assert [document.content for document in read({str(copy)!r})] == [b"one", b"two"]
for source, field in (("weft/absent", "text"), ({str(copy)!r}, "body")):
    try:
        read(source, field)
    except DataError as error:
        print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=CONF_DIR.parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    absent, body = run.stdout.splitlines()
    assert absent.startswith("data.corpora.mine: cannot load 'weft/absent' split 'train' from the hub")
    assert body.startswith("data.corpora.mine.field=body")
    assert body.endswith("has only text")
