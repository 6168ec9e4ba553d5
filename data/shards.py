"""Shards: the unit of tokenising. Each is written whole, recorded with its digest, and never done twice.

A worker process imports this file, so it stays free of torch, datasets and Megatron.
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from conf.errors import DataError
from conf.interrupts import end_at_interrupt, shielded
from data.durable import write_whole
from data.token_file import token_dtype
from data.tokenizer.files import load_tokenizer
from data.tokenizer.tokenizer import Ends, Tokenizer

_DIGEST_BYTES = 32
_FORM = 2  # of a shard's arrays; one of another form, as an earlier version left it, is made again


class ShardRecord(NamedTuple):
    """A finished shard: the documents that went in (sha256 of their sha256), and the xxh3_128 of its file."""

    input_digest: str
    file_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Tokens of consecutive documents of one corpus, held-out ones marked."""

    tokens: np.ndarray  # concatenated, the dtype of the token files
    lengths: np.ndarray  # int64, tokens of each document
    sizes: np.ndarray  # int64, bytes of the text of each document
    held_out: np.ndarray  # bool, for each document
    changed: np.ndarray  # bool, for each document: its tokens give back other bytes
    changed_example: np.ndarray  # uint8, UTF-8 that says what became of the first of these
    hashes: np.ndarray  # uint8 [documents, 32], sha256 of each document
    held_out_text: np.ndarray  # uint8, the text of the held-out documents, concatenated

    def documents(self) -> Iterator[tuple[np.ndarray, bool]]:
        """Tokens of each document, and whether it is held out."""
        ends = np.cumsum(self.lengths)
        for start, end, mark in zip(ends - self.lengths, ends, self.held_out, strict=True):
            yield self.tokens[start:end], bool(mark)


def content_hash(content: bytes) -> bytes:
    """sha256 of a document: its identity in the split, the sample and the digests."""
    return hashlib.sha256(content).digest()


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether the document with this hash is held out; copies of one document fall on one side."""
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def input_digest(hashes: Iterable[bytes]) -> str:
    """sha256 over document hashes in their order, as hex."""
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def make_shard(
    contents: Sequence[bytes], held_out: float, tokenizer: Tokenizer, *, allows_changes: bool = False
) -> Shard:
    """Each document as begin, pieces, end.

    Raises DataError when the tokens of a document do not decode to its bytes, unless that is allowed.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    begin = np.array([] if tokenizer.bos is None else [tokenizer.bos], dtype)
    end = np.array([tokenizer.eos], dtype)
    documents, changed, example = [], [], ""
    for content, pieces in zip(contents, tokenizer.encode_batch(contents), strict=True):
        back = tokenizer.decode(pieces)
        changed.append(back != content)
        if changed[-1] and not allows_changes:
            raise DataError(
                f"the tokenizer changes a document: {change(content, back)}; set "
                "data.tokenizer.allows_changes=true to train on what it makes of such texts, or use another "
                "data.tokenizer.model (what is tokenised is kept)"
            )
        if changed[-1] and not example:
            example = change(content, back)
        documents.append(np.concatenate([begin, pieces.astype(dtype), end]))
    hashes = [content_hash(content) for content in contents]
    marks = [is_held_out(digest, held_out) for digest in hashes]
    text = b"".join(content for content, mark in zip(contents, marks, strict=True) if mark)
    return Shard(
        tokens=np.concatenate([np.empty(0, dtype), *documents]),
        lengths=np.array([len(document) for document in documents], np.int64),
        sizes=np.array([len(content) for content in contents], np.int64),
        held_out=np.array(marks, bool),
        changed=np.array(changed, bool),
        changed_example=np.frombuffer(example.encode(), np.uint8),
        hashes=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, _DIGEST_BYTES),
        held_out_text=np.frombuffer(text, np.uint8),
    )


def change(content: bytes, back: bytes) -> str:
    """Where a text and what came back of it part, for people."""
    at = next((n for n, pair in enumerate(zip(content, back, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(content), len(back)) if at is None else at
    first = max(0, at - 8)
    return f"{content[first : at + 16]!r} becomes {back[first : at + 16]!r} at byte {at}"


class ShardStore:
    """Finished shards in a working directory: `<name>.npz` and, once that is on disk, `<name>.json`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read_record(self, name: str) -> ShardRecord | None:
        """The record of a finished shard, or None if it was not finished."""
        try:
            record = json.loads((self.directory / f"{name}.json").read_text())
            if record["form"] != _FORM:
                return None
            return ShardRecord(str(record["input_digest"]), str(record["file_digest"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def has(self, name: str, wanted_input: str) -> bool:
        """Whether the shard is finished, of these very documents, and whole on disk."""
        record = self.read_record(name)
        if record is None or record.input_digest != wanted_input:
            return False
        try:
            return xxhash.xxh3_128_hexdigest(self._path(name).read_bytes()) == record.file_digest
        except FileNotFoundError:
            return False

    def write(self, name: str, shard: Shard) -> None:
        """Publish a shard, its record last. Raises OSError; a shard that failed is as if never begun."""
        buffer = io.BytesIO()
        np.savez(buffer, **{key: getattr(shard, key) for key in Shard.__slots__})
        content = buffer.getvalue()
        hashes = shard.hashes.tobytes()
        record = ShardRecord(hashlib.sha256(hashes).hexdigest(), xxhash.xxh3_128_hexdigest(content))
        write_whole(self._path(name), content)
        write_whole(self.directory / f"{name}.json", json.dumps({"form": _FORM, **record._asdict()}).encode())

    def read(self, name: str) -> Shard:
        """A finished shard. Raises DataError when its file is not what was recorded."""
        record, path = self.read_record(name), self._path(name)
        content = path.read_bytes()
        found = xxhash.xxh3_128_hexdigest(content)
        if record is None or found != record.file_digest:
            wanted = record.file_digest if record else "a record"
            raise DataError(f"{path}: digest {found}, expected {wanted}; delete it and prepare again")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return Shard(**{key: arrays[key] for key in Shard.__slots__})

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.npz"


class Job(NamedTuple):
    """What a worker needs besides the documents."""

    tokenizer_path: Path
    shard_directory: Path
    held_out: float
    ends: Ends = Ends()
    parses_special: bool = False
    allows_changes: bool = False

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of the job. Raises DataError when it cannot be used."""
        return load_tokenizer(self.tokenizer_path, self.ends, parses_special=self.parses_special)


class Done(NamedTuple):
    """How much a shard held: documents, tokens, and bytes of text."""

    documents: int
    tokens: int
    bytes: int


class Workers:
    """Processes that tokenise shards; none of them when the count is zero, and the caller does the work.

    `done` is told of every shard that is written.
    """

    def __init__(self, count: int, job: Job, done: Callable[[Done], None] = lambda _: None) -> None:
        self._count = count
        self._job = job
        self._done = done
        self._pending: set[Future[Done]] = set()
        self._pool: ProcessPoolExecutor | None = None
        self._tokenizer: Tokenizer | None = None

    def __enter__(self) -> "Workers":
        if self._count:
            # Spawned: a fork would copy the threads and locks of the readers in this process.
            self._pool = ProcessPoolExecutor(self._count, get_context("spawn"), _start_worker)
        else:
            self._tokenizer = self._job.load_tokenizer()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, name: str, contents: Sequence[bytes]) -> int:
        """Hand over a shard; waits while two per worker are under way. The shards that got finished.

        Raises DataError or OSError of a shard that failed.
        """
        if self._pool is None:
            assert self._tokenizer is not None, "Workers is used before it is entered"
            self._done(_write_shard(name, contents, self._job, self._tokenizer))
            return 1
        with _worker_deaths_named(), shielded():
            self._pending.add(self._pool.submit(_work, name, contents, self._job))
        return self._collect(most=2 * self._count)

    def finish(self) -> int:
        """Wait for all. The shards that got finished. Raises DataError or OSError of one that failed."""
        return self._collect(most=0)

    def _collect(self, most: int) -> int:
        finished = 0
        while len(self._pending) > most:
            done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            with _worker_deaths_named():
                for future in done:
                    self._done(future.result())
            finished += len(done)
        return finished


@contextmanager
def _worker_deaths_named() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising process died, most likely for lack of memory; "
            "lower data.workers and run again: finished shards are kept"
        ) from error


def _start_worker() -> None:
    end_at_interrupt()
    parent = parent_process()
    assert parent is not None, "a worker has a parent"

    def end_with_parent() -> None:
        # A killed parent closes no queue: without this its workers would wait for ever.
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(name: str, contents: Sequence[bytes], job: Job) -> Done:
    return _write_shard(name, contents, job, _load_once(job))


@lru_cache(maxsize=1)
def _load_once(job: Job) -> Tokenizer:
    return job.load_tokenizer()


def _write_shard(name: str, contents: Sequence[bytes], job: Job, tokenizer: Tokenizer) -> Done:
    shard = make_shard(contents, job.held_out, tokenizer, allows_changes=job.allows_changes)
    ShardStore(job.shard_directory).write(name, shard)
    return Done(len(contents), len(shard.tokens), sum(map(len, contents)))
