"""Batches out of a prepared dataset: any batch of any rank, from its cursor alone."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from conf.errors import ConfigError, DataError, Violation
from data.card import CorpusCard, read_card
from data.config import HELD_OUT
from data.durable import file_digest
from data.indexed import expected_digests, open_stream
from data.mixture import Mixture
from data.packing import Packing, Windows, read_windows
from data.token_file import TokenFile
from data.token_stream import TokenStream
from data.tokenizer.files import read_files, tokenizer_digest
from data.tokenizer.tokenizer import Tokenizer

IGNORED = -100  # the target that no loss counts
_WINDOW_BITS = 48


class Batch(NamedTuple):
    """B windows of T tokens, all int64 on the CPU.

    A target is the next token, or IGNORED where that belongs to another document. `document` counts from
    0 in each row; `position` counts from 0 at each document and at the start of the row. `sample_ids`
    name windows of the dataset: equal ids are the same tokens, in every epoch and on every rank.
    """

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    document: Int64[Tensor, "B T"]
    position: Int64[Tensor, "B T"]
    sample_ids: Int64[Tensor, "B"]


class Loader:
    """Random access to the endless stream of training sequences, and to the held-out stream in order.

    Sequence i is a pure function of (dataset, sequence_length, seed, weights, i). A rank asks for its own
    cursors; there is no state to save but the cursor.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        sequence_length: int,
        seed: int,
        weights: Mapping[str, float] | None,
        vocab_size: int,
        epochs: Mapping[str, float] | None = None,
        begin: int = 0,
        consumed: Mapping[str, int] | None = None,
    ) -> None:
        """Open and check the dataset; nothing is read but its card, its tokenizer and its indices.

        `weights` are shares by corpus, and a corpus without one is not used; None takes corpora by their
        tokens. `epochs` says instead how often each is read for one reading of a corpus with 1. `begin` and
        `consumed` are the cursor and the counts at which an earlier stage stopped.

        Raises DataError for files that are not whole or do not belong together, and ConfigError for
        weights that cannot be used.
        """
        self.directory = Path(directory).expanduser()
        self.card = read_card(self.directory)
        self.sequence_length = sequence_length
        self._check_tokenizer()
        self.check(vocab_size)
        self._files = {name: self._open(name) for name, _ in self.card.token_files()}
        self._names = list(self.card.corpora)
        if epochs is not None:
            weights = {name: value * self._tokens_of(name) for name, value in epochs.items()}
        shares = self._shares(weights)
        try:
            self._mixture = Mixture(shares, seed, begin=begin, consumed=consumed)
        except ValueError as error:
            raise ConfigError([Violation("data.corpora.*.weight", str(error))]) from error
        self._packings = {
            corpus_id: Packing(self._files[name], sequence_length, seed, corpus_id)
            for corpus_id, name in enumerate(self._names)
            if shares[name] > 0
        }
        held_out_tokens = self._files[HELD_OUT].num_tokens
        self.held_out_rows = max(0, -(-(held_out_tokens - 1) // sequence_length))

    @property
    def fingerprint(self) -> str:
        """sha256 over the digests of the tokens and the tokenizer."""
        return self.card.fingerprint

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the tokens."""
        return self.card.tokenizer.load(self.directory)

    def describe(self) -> str:
        """What an epoch of the corpora leaves out, for people."""
        left_out = {self._names[index]: packing.left_out for index, packing in self._packings.items()}
        tokens = sum(self.card.corpora[name].tokens for name in left_out)
        said = f"data: {tokens:,} tokens in windows of {self.sequence_length:,}"
        share, most = max((count / self.card.corpora[name].tokens, name) for name, count in left_out.items())
        if not share:
            return f"{said}; an epoch leaves out none"
        return (
            f"{said}; an epoch leaves out {sum(left_out.values()):,}, the next one others (at most "
            f"{share:.2%} of a corpus, {most})"
        )

    @property
    def unused(self) -> list[str]:
        """Corpora of the dataset that have no weight, so that nothing of them is read."""
        return [name for corpus_id, name in enumerate(self._names) if corpus_id not in self._packings]

    def consumed(self, cursor: int) -> dict[str, int]:
        """Sequences of each corpus before `cursor`, to begin the next stage with."""
        return self._mixture.consumed(cursor)

    def check(self, vocab_size: int) -> None:
        """Raises DataError when a model of `vocab_size` has no embedding for some piece of the tokenizer."""
        needed = self.card.tokenizer.vocab_size
        if vocab_size < needed:
            raise DataError(
                f"{self.directory}: its tokenizer has {needed} ids, but the model has "
                f"vocab_size={vocab_size}; set model.vocab_size to {needed} or more"
            )

    def verify(self) -> None:
        """Read every token file once. Raises DataError for one whose content is not what was prepared."""
        for name, card in self.card.token_files():
            for path, expected in expected_digests(self.directory, name, card):
                found = file_digest(path)
                if found != expected:
                    raise DataError(
                        f"{path}: digest {found}, expected {expected}; prepare or copy the dataset again"
                    )

    def batch(self, cursor: int, rows: int) -> Batch:
        """Sequences [cursor, cursor + rows) of the training stream.

        Raises DataError for a token that the model has no embedding for.
        """
        corpora, turns = self._mixture.locate(np.arange(cursor, cursor + rows, dtype=np.int64))
        width = self.sequence_length + 1
        tokens, starts = np.empty((rows, width), np.int64), np.empty((rows, width), bool)
        sample_ids = np.empty(rows, np.int64)
        for corpus_id in np.unique(corpora).tolist():
            chosen = np.flatnonzero(corpora == corpus_id)
            packing = self._packings[corpus_id]
            window_ids = packing.window_ids(turns[chosen])
            windows = packing.read(window_ids)
            self._check_ids(packing.file, windows, packing.positions(window_ids))
            tokens[chosen], starts[chosen] = windows
            sample_ids[chosen] = corpus_id << _WINDOW_BITS | window_ids
        return _make_batch(Windows(tokens, starts), sample_ids)

    def held_out(self, row_start: int, rows: int) -> Batch:
        """Rows [row_start, row_start + rows) of the held-out stream, in order.

        Over all held_out_rows every token but the first of each document is a target exactly once. What
        is past the end is padding: end tokens, a document of its own, targets IGNORED.
        """
        file, length = self._files[HELD_OUT], self.sequence_length
        ids = np.arange(row_start, row_start + rows, dtype=np.int64)
        inside = ids < self.held_out_rows
        full = ids * length + length < file.num_tokens
        tokens = np.full((rows, length + 1), self.card.tokenizer.eos, np.int64)
        starts = np.zeros((rows, length + 1), bool)
        whole = read_windows(file, ids[full] * length, length)
        self._check_ids(file, whole, ids[full] * length)
        tokens[full], starts[full] = whole
        targets_end = np.where(full, length, 0)
        for row in np.flatnonzero(inside & ~full):  # the last window, if it is partial
            begin = ids[row : row + 1] * length
            size = file.num_tokens - int(begin[0])
            part = read_windows(file, begin, size - 1)
            self._check_ids(file, part, begin)
            tokens[row, :size], starts[row, :size] = part.tokens[0], part.starts[0]
            starts[row, size] = True
            targets_end[row] = size - 1
        batch = _make_batch(Windows(tokens, starts), len(self._names) << _WINDOW_BITS | ids)
        padding = np.arange(length) >= targets_end[:, None]
        batch.targets[torch.from_numpy(padding)] = IGNORED
        return batch

    def prefetch(self, cursor: int, rows: int) -> "Future[Batch]":
        """`batch(cursor, rows)`, worked out in a thread of this loader."""
        return self._thread.submit(self.batch, cursor, rows)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="loader")

    def _open(self, name: str) -> TokenFile | TokenStream:
        card = dict(self.card.token_files())[name]
        if isinstance(card, CorpusCard) and card.files:
            return open_stream(self.directory, name, card)
        file = TokenFile(self.directory / name)
        if (file.num_documents, file.num_tokens) != (card.documents, card.tokens):
            raise DataError(
                f"{file.idx_path}: found {file.num_documents} documents, {file.num_tokens} tokens; expected "
                f"{card.documents}, {card.tokens}; it is of another dataset, prepare or copy it again"
            )
        return file

    def _tokens_of(self, name: str) -> int:
        # A corpus that is not there is named by what reads the shares.
        return self.card.corpora[name].tokens if name in self.card.corpora else 1

    def _check_tokenizer(self) -> None:
        found = tokenizer_digest(read_files(self.directory), str(self.directory))
        if found != self.card.tokenizer.digest:
            raise DataError(
                f"{self.directory}: its tokenizer has sha256 {found}, but the tokens were written with "
                f"{self.card.tokenizer.digest}; put that tokenizer back or prepare the data again"
            )

    def _check_ids(self, file: TokenFile | TokenStream, windows: Windows, starts: np.ndarray) -> None:
        tokens = windows.tokens
        # The tokenizer's own size: an id that only the padding of an embedding could serve is wrong too.
        limit = self.card.tokenizer.vocab_size
        if not tokens.size or (tokens.min() >= 0 and tokens.max() < limit):
            return
        row, column = np.argwhere((tokens < 0) | (tokens >= limit))[0]
        path, index = file.where(int(starts[row] + column))
        found = int(tokens[row, column])
        raise DataError(
            f"{path}: token {index} (byte {index * file.dtype.itemsize}) is {found}, "
            f"expected 0 to {limit - 1}; prepare or copy the dataset again"
        )

    def _shares(self, weights: Mapping[str, float] | None) -> dict[str, float]:
        if weights is None:
            return {name: float(card.tokens) for name, card in self.card.corpora.items()}
        unknown = [
            Violation(f"data.corpora.{name}", f"not in {self.directory}, which has {', '.join(self._names)}")
            for name in weights
            if name not in self.card.corpora
        ]
        if unknown:
            raise ConfigError(unknown)
        return {name: float(weights.get(name, 0.0)) for name in self._names}


def _make_batch(windows: Windows, sample_ids: np.ndarray) -> Batch:
    starts = windows.starts[:, :-1]
    targets = np.where(windows.starts[:, 1:], IGNORED, windows.tokens[:, 1:])
    columns = np.arange(starts.shape[1])
    began = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return Batch(
        tokens=torch.from_numpy(windows.tokens[:, :-1].copy()),
        targets=torch.from_numpy(targets),
        document=torch.from_numpy(np.cumsum(starts, axis=1, dtype=np.int64)),
        position=torch.from_numpy(columns - began),
        sample_ids=torch.from_numpy(sample_ids),
    )
