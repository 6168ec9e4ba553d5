"""Documents to tokens on disk: `python -m data.prepare data=stdlib data.directory=DIR`.

The work is done in `DIR.partial`, which a killed run leaves and the next one continues; the finished
dataset appears as `DIR` in one rename.
"""

import fcntl
import os
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from conf.compose import Config, compose
from conf.errors import DataError, as_storage_error
from conf.help import Page, run
from data.card import CARD, Card, content_settings, difference, read_card
from data.config import DataConfig
from data.durable import named, sync, write_whole
from data.merge import merge
from data.scan import DocumentReader, Scan, read_scan, scan
from data.shards import Done, Job, ShardStore, Workers, input_digest
from data.tokenizer.files import find_tokenizer, made_from, read_files, write_files
from data.tokenizer.tokenizer import Ends, Tokenizer

_SHARD_BYTES = 2 << 20

Advance = Callable[[int], None]


class Prepared(NamedTuple):
    """A finished dataset; `is_new` says whether this call made it or found it."""

    directory: Path
    card: Card
    is_new: bool


class PrepareConfig(Config):
    """The part of the config tree that this command reads."""

    data: DataConfig


PAGE = Page(
    __doc__ or "",
    (
        "python -m data.prepare",
        "python -m data.prepare data=jsonl data.corpora.documents.source=FILES data.directory=corpora/mine",
        "python -m data.prepare data=stdlib data.directory=corpora/big data.tokenizer.vocab_size=8192",
    ),
    {"data=OPTION": "a file of conf/data", "data.KEY=VALUE": "a value within it"},
    sections=lambda: ("data",),
    root=lambda: PrepareConfig,
)


def prepare(config: DataConfig, *, progress: bool = True, shard_bytes: int = _SHARD_BYTES) -> Prepared:
    """The dataset that `config` asks for, on disk and complete; at once if it is already there.

    The files depend on the documents and the content settings alone: not on `shard_bytes` (text per unit
    of work), on the number of workers, or on how often the work was interrupted.

    Raises DataError for documents, a tokenizer or an existing directory that cannot be used, and
    StorageError when the disk refuses.
    """
    directory = Path(config.directory).expanduser()
    if directory.name in ("", ".."):
        raise DataError(f"data.directory={config.directory}: not the name of a new directory; give it one")
    given = given_tokenizer(config)
    settings = content_settings(config, given)
    try:
        if found := _find_finished(directory, settings):
            return found
        partial = directory.with_name(directory.name + ".partial")
        with _hold(partial):
            # Another process may have finished it while this one waited for the file system.
            if found := _find_finished(directory, settings):
                shutil.rmtree(partial)
                return found
            with _bar(progress) as bar:
                card = _Preparation(config, settings, given, partial, bar).run(shard_bytes)
            _publish(partial / "out", directory)
            shutil.rmtree(partial)
    except OSError as error:
        raise as_storage_error(error, error.filename or directory) from error
    return Prepared(directory, card, True)


def main(arguments: Sequence[str]) -> None:
    """Prepares what the overrides ask for and prints what it holds. Raises the errors of conf.errors."""
    config = compose(arguments, PrepareConfig).data
    prepared = prepare(config)
    for line in summary(prepared):
        print(line)
    print(f"train on it: {train_command(config)}")


def train_command(config: DataConfig) -> str:
    """The command that trains on what was prepared, as a shell takes it."""
    return shlex.join(["python", "-m", "train", f"data.directory={config.directory}"])


def summary(prepared: Prepared) -> list[str]:
    """The dataset in a few lines for people."""
    card = prepared.card
    state = "prepared" if prepared.is_new else "was already prepared with these settings"
    ids, fingerprint = card.tokenizer.vocab_size, card.fingerprint[:16]
    lines = [f"{prepared.directory} {state}: {ids} ids, fingerprint {fingerprint}"]
    for name, part in card.token_files():
        ratio = f" ({part.bytes / part.tokens:.2f} a token)" if part.tokens else ""
        text = f", {part.bytes:,} bytes{ratio}" if part.bytes else ""
        counts = f"{part.documents:,} documents, {part.tokens:,} tokens{text}"
        lines.append(f"  {name}: {counts}")
    for name, part in card.corpora.items():
        left_out = (part.empty, "empty", part.empty_examples), (part.bad, "bad", part.bad_examples)
        for count, what, examples in left_out:
            if count:
                example = f", such as {examples[0]}" if examples else ""
                lines.append(f"  {name}: left out {count:,} {what} documents{example}")
        if part.changed:
            example = f", such as where {part.changed_example}"
            lines.append(f"  {name}: the tokenizer changes {part.changed:,} documents{example}")
        lines += [f"  {name}: passed over {line}" for line in part.passed_over]
    if held_out := card.held_out.bytes:
        gzip_bits = 8 * card.held_out.gzip_bytes / held_out
        xz_bits = 8 * card.held_out.xz_bytes / held_out
        lines.append(f"  held-out text: gzip -9 {gzip_bits:.3f}, xz -9 {xz_bits:.3f} bits per byte")
    return lines


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that data.tokenizer.model names; None where one is to be trained. Raises DataError."""
    asked = config.tokenizer
    if asked.model is None:
        return None
    files = read_files(find_tokenizer(asked.model), asked.pattern)
    return made_from(files, asked.model, Ends(asked.bos, asked.eos), parses_special=asked.parses_special)


class _Preparation:
    """One run of the work inside the partial directory, which this process holds."""

    def __init__(
        self,
        config: DataConfig,
        settings: dict[str, Any],
        given: Tokenizer | None,
        partial: Path,
        bar: Progress,
    ) -> None:
        self._config = config
        self._settings = settings
        self._given = given
        self._partial = partial
        self._bar = bar
        self._store = ShardStore(partial / "shards")
        self._tokenizer = partial / "tokenizer"

    def run(self, shard_bytes: int) -> Card:
        """Scan, tokenise, merge; the card of the files in `out`."""
        scanned, tokenizer = self._scan()
        self._store.directory.mkdir(exist_ok=True)
        total = sum(found.bytes for found in scanned.corpora.values())
        shards = self._tokenise(scanned, shard_bytes, _Counts(self._bar, "tokenising", total))
        out = self._partial / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return merge(
            self._store, shards, scanned, self._config, tokenizer, out, self._track("merging", total)
        )

    def _write_tokenizer(self, tokenizer: Tokenizer) -> None:
        # What an earlier start left may be of another kind, and would be read in its place.
        shutil.rmtree(self._tokenizer, ignore_errors=True)
        self._tokenizer.mkdir()
        write_files(tokenizer.files, self._tokenizer)

    def _kept_tokenizer(self) -> Tokenizer | None:
        if self._given is not None or not self._tokenizer.is_dir():
            return self._given
        return made_from(read_files(self._tokenizer), str(self._tokenizer))

    def _track(self, what: str, total: int | None) -> Advance:
        task = self._bar.add_task(what, total=total, counted="")
        return lambda amount: self._bar.advance(task, amount)

    def _scan(self) -> tuple[Scan, Tokenizer]:
        path = self._partial / "scan.json"
        kept = read_scan(path)
        if kept and kept.settings == self._settings:
            tokenizer = self._kept_tokenizer()
            if tokenizer is not None and tokenizer.digest == kept.tokenizer_digest:
                self._write_tokenizer(tokenizer)
                return kept, tokenizer
        # Shards of other settings are of no use, and must not be taken for finished ones of these.
        shutil.rmtree(self._store.directory, ignore_errors=True)
        path.unlink(missing_ok=True)
        scanned, tokenizer = scan(self._config, self._settings, self._given, self._track("reading", None))
        self._write_tokenizer(tokenizer)
        write_whole(path, scanned.model_dump_json().encode())
        return scanned, tokenizer

    def _tokenise(self, scanned: Scan, shard_bytes: int, counts: "_Counts") -> dict[str, list[str]]:
        reader, asked = DocumentReader(self._config), self._config.tokenizer
        shards: dict[str, list[str]] = {}
        job = Job(
            self._tokenizer,
            self._store.directory,
            self._config.held_out,
            Ends(asked.bos, asked.eos),
            asked.parses_special,
            asked.allows_changes,
        )
        with Workers(self._config.workers, job, counts.add) as workers:
            for name in reader.names:
                shards[name] = []
                for contents, hashes in _groups(reader.usable(name), shard_bytes):
                    shard = f"{name}-{len(shards[name]):06d}"
                    shards[name].append(shard)
                    if not self._store.has(shard, input_digest(hashes)):
                        workers.submit(shard, contents)
                    else:
                        counts.add(Done(len(contents), 0, sum(map(len, contents))))
                if reader.scans[name] != scanned.corpora[name]:
                    raise DataError(
                        f"data.corpora.{name}.source={self._config.corpora[name].source}: the documents "
                        f"changed while they were prepared; delete {self._partial} and run again"
                    )
            workers.finish()
        return shards


def _groups(
    documents: Iterator[tuple[bytes, bytes]], group_bytes: int
) -> Iterator[tuple[list[bytes], list[bytes]]]:
    contents: list[bytes] = []
    hashes: list[bytes] = []
    size = 0
    for content, digest in documents:
        contents.append(content)
        hashes.append(digest)
        size += len(content)
        if size >= group_bytes:
            yield contents, hashes
            contents, hashes, size = [], [], 0
    if contents:
        yield contents, hashes


def _find_finished(directory: Path, settings: dict[str, Any]) -> Prepared | None:
    if not directory.exists():
        return None
    if not (directory / CARD).exists():
        if directory.is_dir() and not any(directory.iterdir()):
            return None
        raise DataError(
            f"data.directory={directory}: exists and is not a prepared dataset; choose another directory"
        )
    card = read_card(directory)
    if differing := difference(settings, card.settings):
        raise DataError(f"data.directory={directory}: {differing}; choose another data.directory")
    return Prepared(directory, card, False)


@contextmanager
def _hold(partial: Path) -> Iterator[None]:
    """Own the partial directory as long as this process lives."""
    with _lock(partial) as stream:
        with named(partial / "lock"):
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _lock(partial: Path) -> FileIO:
    path = partial / "lock"
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+b", buffering=0)  # else closing would write again what could not be written
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().decode("utf-8", "replace") or "another process"
            stream.close()
            raise DataError(
                f"{partial}: is being prepared by {holder}; wait for it, or choose another data.directory"
            ) from error
        # The holder before may have published, and deleted the very file that is locked now.
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            return stream
        stream.close()


def _publish(out: Path, directory: Path) -> None:
    out.rename(directory)
    sync(directory.parent)


class _Counts:
    """The bar of a pass that counts documents and tokens beside bytes; tokens are those of this start."""

    def __init__(self, bar: Progress, what: str, total: int) -> None:
        self._bar, self._documents, self._tokens = bar, 0, 0
        self._task = bar.add_task(what, total=total, counted="")

    def add(self, done: Done) -> None:
        """Counts a shard."""
        self._documents += done.documents
        self._tokens += done.tokens
        counted = f"{self._documents:,} documents, {self._tokens:,} tokens"
        self._bar.update(self._task, advance=done.bytes, counted=counted)


def _bar(is_shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[counted]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not is_shown)


if __name__ == "__main__":
    run(main, PAGE)
