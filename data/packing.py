"""Windows over a token stream: their order in every epoch, and where documents begin inside them."""

from typing import NamedTuple

import numpy as np

from conf.errors import DataError
from data.token_file import TokenFile
from data.token_stream import TokenStream

_ROUNDS = 6
_MIN_HALF_BITS = 3  # a smaller network has too few permutations to look random
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Windows(NamedTuple):
    """Windows of T + 1 tokens.

    tokens: int64 [B, T + 1]. starts: bool [B, T + 1], the first token of a document, unless it opens the
    window.
    """

    tokens: np.ndarray
    starts: np.ndarray


class Packing:
    """The windows of one token file: T + 1 tokens each, T apart, so that every token is a target once.

    Each epoch leaves out the `left_out` tokens, fewer than T, that fill no window: those at the end in the
    first, third and so on, and those at the beginning in the others. So two epochs learn every token. In
    every epoch each window comes once, in an order that is a pure function of (seed, corpus, epoch).
    """

    def __init__(
        self, file: TokenFile | TokenStream, sequence_length: int, seed: int, corpus_id: int
    ) -> None:
        """Raises DataError when the file has no whole window."""
        self.file = file
        self.sequence_length = sequence_length
        # The first token of the stream is no target.
        self.num_windows, self.left_out = divmod(max(0, file.num_tokens - 1), sequence_length)
        self._seed = seed
        self._corpus_id = corpus_id
        if self.num_windows < 1:
            raise DataError(
                f"{file.bin_path}: {file.num_tokens} tokens, a window needs data.sequence_length + 1 = "
                f"{sequence_length + 1}; add documents or lower data.sequence_length"
            )

    def window_ids(self, turns: np.ndarray) -> np.ndarray:
        """The window for each turn of the corpus, int64: turns 0 to num_windows - 1 are the first epoch.

        Ids from num_windows on are those of windows that begin `left_out` tokens later.
        """
        epochs, window_indices = np.divmod(turns, self.num_windows)
        keys = np.full(turns.shape, self._seed, np.uint64)
        for part in (np.full(turns.shape, self._corpus_id, np.uint64), epochs.astype(np.uint64)):
            keys = _mix(keys ^ _mix(part * _GOLDEN))
        begins_late = (epochs % 2 == 1) & (self.left_out > 0)
        return permute(window_indices, self.num_windows, keys) + begins_late * self.num_windows

    def positions(self, window_ids: np.ndarray) -> np.ndarray:
        """The token at which each window begins, int64."""
        late, window_indices = np.divmod(window_ids, self.num_windows)
        return window_indices * self.sequence_length + late * self.left_out

    def read(self, window_ids: np.ndarray) -> Windows:
        """The windows with these ids, in this order."""
        return read_windows(self.file, self.positions(window_ids), self.sequence_length)


def read_windows(file: TokenFile | TokenStream, starts: np.ndarray, sequence_length: int) -> Windows:
    """Windows that begin at the token positions `starts`, each wholly inside the file."""
    width = sequence_length + 1
    rows = [file.tokens(start, start + width) for start in starts.tolist()]
    tokens = np.stack(rows).astype(np.int64) if rows else np.empty((0, width), np.int64)
    return Windows(tokens, _document_starts(file.document_offsets, starts, width))


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of [0, size) takes each index, int64; each key (uint64) is one permutation.

    A Feistel network on the next even power of two; what falls outside walks on along its cycle. So
    access is random and nothing is stored, at any size.
    """
    half_bits = max(_MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, keys[outside])
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        round_keys = keys + np.full_like(keys, number + 1) * _GOLDEN
        left, right = right, left ^ (_mix(right ^ _mix(round_keys)) & mask)
    return left << shift | right


def _mix(values: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64: every input bit reaches every output bit. Overflow is meant.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _document_starts(offsets: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    flags = np.zeros((len(starts), width), bool)
    first = np.searchsorted(offsets, starts, side="right")
    counts = np.searchsorted(offsets, starts + width - 1, side="right") - first
    rows = np.repeat(np.arange(len(starts)), counts)
    # Number of each boundary inside its own row: a running count, less what came in earlier rows.
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    flags[rows, offsets[first[rows] + within] - starts[rows]] = True
    return flags
