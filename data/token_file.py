"""Token files: Megatron-Core indexed datasets, opened by memory map and checked before use.

A pair of files. `.idx` is a header (magic, version, dtype code, counts), then the length of every
sequence (int32), its byte offset in `.bin` (int64), and the first sequence of every document plus the
end (int64). `.bin` is the tokens. A document is one or more sequences.
"""

import struct
from pathlib import Path

import numpy as np

from conf.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
_BYTES_PER_SEQUENCE = 4 + 8
_BYTES_PER_DOCUMENT = 8
_UINT16_VOCAB = 65_500  # Megatron's own limit, so that its readers and ours choose the same dtype


class TokenFile:
    """The concatenated tokens of many documents, read in place.

    Random access by document and by position; nothing is loaded but the offsets, 8 bytes a document.
    """

    def __init__(self, prefix: Path) -> None:
        """`prefix` is the path without `.bin` and `.idx`. Raises DataError when the pair is not whole."""
        self.bin_path = prefix.with_name(prefix.name + ".bin")
        self.idx_path = prefix.with_name(prefix.name + ".idx")
        self.dtype, lengths, pointers, first_sequences = _read_index(self.idx_path)
        self.document_offsets = self._check_index(lengths, pointers, first_sequences)
        self.num_tokens = int(self.document_offsets[-1])
        self.num_documents = len(self.document_offsets) - 1
        expected = self.num_tokens * self.dtype.itemsize
        found = _size_of(self.bin_path)
        if found != expected:
            raise DataError(_wrong_size(self.bin_path, found, expected))
        # A memory map of nothing is an error to the system, but no documents are a valid file.
        empty = np.empty(0, self.dtype)
        self._tokens: np.ndarray = (
            np.memmap(self.bin_path, self.dtype, mode="r", shape=(self.num_tokens,)) if expected else empty
        )

    def _check_index(self, lengths: np.ndarray, pointers: np.ndarray, firsts: np.ndarray) -> np.ndarray:
        if len(lengths) and int(lengths.min()) < 0:
            at = int(lengths.argmin())
            raise DataError(self._damaged(f"sequence {at} has length {int(lengths[at])}"))
        ends = np.cumsum(lengths, dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), ends])
        wrong = np.flatnonzero(pointers != offsets[:-1] * self.dtype.itemsize)
        if len(wrong):
            at = int(wrong[0])
            expected = int(offsets[at]) * self.dtype.itemsize
            found = int(pointers[at])
            raise DataError(self._damaged(f"sequence {at} is at byte {found}, expected {expected}"))
        if firsts[0] != 0 or firsts[-1] != len(lengths) or (firsts[1:] < firsts[:-1]).any():
            raise DataError(self._damaged(f"documents do not run from 0 to {len(lengths)} sequences"))
        return offsets[firsts]

    def _damaged(self, what: str) -> str:
        return f"{self.idx_path}: damaged index: {what}; prepare or copy the dataset again"

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, a read-only view. Raises IndexError beyond the last."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.bin_path}")
        return self.tokens(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    def where(self, position: int) -> tuple[Path, int]:
        """The file that holds a token, and its number there."""
        return self.bin_path, position

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all documents laid end to end, a read-only view.

        Raises IndexError outside the stream: a slice that comes back short would go unnoticed.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.bin_path}")
        return self._tokens[start:stop]


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype that Megatron uses for a vocabulary: uint16 or int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCAB else np.int32)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    size = _size_of(path)
    try:
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; make it readable") from error
    if len(header) < _HEADER.size:
        raise DataError(_wrong_size(path, size, _HEADER.size))
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise DataError(f"{path}: starts with {magic!r}, expected {_MAGIC!r}; it is no indexed dataset")
    if version != _VERSION:
        raise DataError(f"{path}: index version {version}, expected {_VERSION}; write it with Megatron-Core")
    if code not in _DTYPES:
        raise DataError(f"{path}: dtype code {code}, expected one of {sorted(_DTYPES)}; prepare it again")
    expected = _HEADER.size + num_sequences * _BYTES_PER_SEQUENCE + num_boundaries * _BYTES_PER_DOCUMENT
    # Multimodal files carry one byte more for every sequence, its mode.
    if size not in (expected, expected + num_sequences) or num_boundaries < 1:
        raise DataError(_wrong_size(path, size, expected))
    raw = np.memmap(path, np.uint8, mode="r")
    lengths_end = _HEADER.size + 4 * num_sequences
    pointers_end = lengths_end + 8 * num_sequences
    lengths = raw[_HEADER.size : lengths_end].view(np.int32)
    pointers = raw[lengths_end:pointers_end].view(np.int64)
    firsts = raw[pointers_end:expected].view(np.int64)
    return _DTYPES[code], lengths, pointers, firsts


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot open: {error.strerror}; prepare it or correct the path") from error


def _wrong_size(path: Path, found: int, expected: int) -> str:
    state = "cut short" if found < expected else "too long"
    return f"{path}: {state}: found {found} bytes, expected {expected}; prepare or copy the dataset again"
