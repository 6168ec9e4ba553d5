"""Documents out of files, jsonl, parquet and the Hugging Face hub: bytes, and where they came from."""

import bz2
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from conf.errors import DataError
from data.config import CorpusConfig
from data.files import find_files


def _open_zst(path: Path, mode: Literal["rb"]) -> IO[bytes]:
    from backports import zstd

    # Files of `zstd --long=31` need a window of 2 GiB.
    return cast(IO[bytes], zstd.open(path, mode, options={zstd.DecompressionParameter.window_log_max: 31}))


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
_MAX_LINE_BYTES = 1 << 30  # a longer jsonl line is a broken or hostile file, not a document


class Document(NamedTuple):
    """The bytes of one document, its origin as `path` or `path:line`, and why it is unusable, if it is."""

    content: bytes
    origin: str
    fault: str = ""


def read_documents(name: str, corpus: CorpusConfig) -> Iterator[Document]:
    """Every document of a corpus in a fixed order, empty and faulty ones included.

    A document is faulty when it holds a NUL byte or is not UTF-8, when its line is not JSON, or when
    its row has no such field. Nothing is deduplicated or altered.

    Raises DataError when the source cannot be read at all.
    """
    if corpus.kind in ("code", "text"):
        return _read_files(name, corpus)
    if corpus.kind == "jsonl":
        return _read_jsonl(name, corpus)
    return _read_columns(name, corpus)


def fault_of(content: bytes) -> str:
    """Why `content` is not text, with the byte offset; empty when it is."""
    if (nul := content.find(b"\0")) >= 0:
        return f"binary: NUL at byte {nul}"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start} (0x{content[error.start]:02x})"
    return ""


def _read_files(name: str, corpus: CorpusConfig) -> Iterator[Document]:
    for path in find_files(name, corpus).paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read: {error.strerror}; leave it out") from error
        yield Document(content, str(path), fault_of(content))


def _read_jsonl(name: str, corpus: CorpusConfig) -> Iterator[Document]:
    assert corpus.field is not None, f"{corpus=}"
    for path in find_files(name, corpus).paths:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield _from_json(line, corpus.field, f"{path}:{number}")


def _lines(path: Path) -> Iterator[bytes]:
    opener = _OPENERS.get(path.suffix, open)
    number = 0
    try:
        stream: IO[bytes]
        with opener(path, "rb") as stream:
            while line := stream.readline(_MAX_LINE_BYTES):
                number += 1
                if len(line) == _MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number}: a line of {_MAX_LINE_BYTES} bytes or more; split it")
                yield line
    except (EOFError, lzma.LZMAError, zlib.error, OSError, *_zst_errors()) as error:
        raise DataError(
            f"{path}:{number + 1}: cannot read: {error}; the file is cut short or damaged, fetch it again"
        ) from error


def _zst_errors() -> tuple[type[Exception], ...]:
    # Not imported for files that are none.
    module = sys.modules.get("backports.zstd")
    return () if module is None else (module.ZstdError,)


def _from_json(line: bytes, field: str, origin: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return Document(b"", origin, f"not JSON: {error}")
    except RecursionError:
        return Document(b"", origin, "not JSON: nested too deeply")
    if not isinstance(row, dict):
        return Document(b"", origin, f"a JSON {type(row).__name__}, not an object")
    return _from_row(row, field, origin)


def _from_row(row: dict[str, Any], field: str, origin: str) -> Document:
    if field not in row:
        return Document(b"", origin, f"no field {field!r}; found {', '.join(map(str, row)) or 'none'}")
    value = row[field]
    if value is None:
        return Document(b"", origin)
    if isinstance(value, str):
        try:
            content = value.encode("utf-8")
        except UnicodeEncodeError as error:
            return Document(b"", origin, f"lone surrogate at character {error.start}")
    elif isinstance(value, bytes):
        content = value
    else:
        return Document(b"", origin, f"field {field!r} is {type(value).__name__}, not text")
    return Document(content, origin, fault_of(content))


def _read_columns(name: str, corpus: CorpusConfig) -> Iterator[Document]:
    assert corpus.field is not None, f"{corpus=}"
    if corpus.kind == "hub":
        sources = iter([(corpus.source, _load_hub(name, corpus, corpus.field))])
    else:
        sources = ((str(path), _load_parquet(path)) for path in find_files(name, corpus).paths)
    for origin, rows in sources:
        number = 0
        try:
            for number, row in enumerate(rows, 1):
                yield _from_row(row, corpus.field, f"{origin}:{number}")
        except DataError:
            raise
        # datasets and its readers raise many types, none of them documented.
        except Exception as error:
            raise DataError(
                f"{origin}:{number + 1}: cannot read: {_one_line(error)}; the file is cut short or damaged"
            ) from error


def _load_parquet(path: Path) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        # Streaming reads in place; otherwise the whole corpus is copied into a cache first.
        return load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except Exception as error:
        raise DataError(f"{path}: cannot read as parquet: {_one_line(error)}; fetch it again") from error


def _load_hub(name: str, corpus: CorpusConfig, field: str) -> Iterable[dict[str, Any]]:
    from datasets import Dataset, load_dataset

    try:
        rows = load_dataset(corpus.source, split=corpus.split)
    except Exception as error:
        raise DataError(
            f"data.corpora.{name}: cannot load {corpus.source!r} split {corpus.split!r} from the hub: "
            f"{_one_line(error)}; check the name and the network, or fetch it as parquet"
        ) from error
    assert isinstance(rows, Dataset), f"{type(rows)=}"
    if field not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise DataError(f"data.corpora.{name}.field={field}: {corpus.source!r} has only {columns}")
    # Only the text: other columns may hold images or audio that would be decoded for nothing.
    return (dict(row) for row in rows.select_columns(field))


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
