"""Token files of others, read where they lie: documents of several pairs as one stream, some left out."""

import glob
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from conf.errors import DataError
from data.config import CorpusConfig
from data.token_file import TokenFile

_ENDINGS = (".bin", ".idx")


class TokenStream:
    """The documents of token files laid end to end, without those left out. Nothing is copied but offsets.

    As a `TokenFile`: random access by document and by position.
    """

    def __init__(self, files: Sequence[TokenFile], left_out: np.ndarray) -> None:
        """`left_out`: int64, documents that are not part of it, sorted, counted over all files."""
        self.files = files
        self.bin_path, self.dtype = files[0].bin_path, files[0].dtype
        counts = [file.num_documents for file in files]
        kept = np.ones(sum(counts), bool)
        kept[left_out] = False
        lengths = np.concatenate([np.diff(file.document_offsets) for file in files])
        self.document_offsets = np.concatenate(
            [np.zeros(1, np.int64), np.cumsum(lengths[kept], dtype=np.int64)]
        )
        self.num_documents = len(self.document_offsets) - 1
        self.num_tokens = int(self.document_offsets[-1])
        # A run of documents that lie side by side in one file is read at once.
        file_of = np.repeat(np.arange(len(files)), counts)
        first = np.flatnonzero(kept & ~(np.r_[False, kept[:-1]] & np.r_[False, file_of[1:] == file_of[:-1]]))
        kept_index = np.cumsum(kept) - 1
        self._begins = self.document_offsets[kept_index[first]]
        starts = np.concatenate([file.document_offsets[:-1] for file in files])
        self._file_of, self._starts = file_of[first], starts[first]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document. Raises IndexError beyond the last."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.bin_path} and others")
        return self.tokens(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream; a copy where they lie apart.

        Raises IndexError outside the stream: a slice that comes back short would go unnoticed.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.bin_path} and others")
        parts = [self.files[file].tokens(first, last) for file, first, last in self._runs(start, stop)]
        if len(parts) == 1:
            return parts[0]
        # Files of one stream may differ in dtype.
        return np.concatenate([np.empty(0, np.int64), *parts]) if parts else np.empty(0, self.dtype)

    def where(self, position: int) -> tuple[Path, int]:
        """The file that holds a token of the stream, and its number there."""
        [(file, first, _)] = self._runs(position, position + 1)
        return self.files[file].bin_path, first

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """File, first and last position of each run of tokens in [start, stop)."""
        if start == stop:
            return
        run = int(np.searchsorted(self._begins, start, side="right")) - 1
        while start < stop:
            end = int(self._begins[run + 1]) if run + 1 < len(self._begins) else self.num_tokens
            last = min(stop, end)
            first = int(self._starts[run]) + start - int(self._begins[run])
            if last > start:
                yield int(self._file_of[run]), first, first + last - start
            start, run = max(start, last), run + 1


def token_file_prefixes(name: str, corpus: CorpusConfig) -> list[Path]:
    """The pairs that a corpus names, without .bin and .idx: as given, and within a folder or a glob by name.

    Raises DataError where there are none.
    """
    key = f"data.corpora.{name}.source"
    found = list[Path]()
    for word in shlex.split(corpus.source):
        path = Path(word).expanduser()
        if path.is_dir():
            matches = sorted(path.rglob("*.idx"))
        elif glob.has_magic(word):
            matches = sorted(match for match in map(Path, glob.glob(str(path))) if match.suffix in _ENDINGS)
        else:
            matches = [path if path.suffix in _ENDINGS else path.with_name(path.name + ".idx")]
        prefixes = list(dict.fromkeys(match.with_suffix("") for match in matches))
        missing = [prefix for prefix in prefixes if not prefix.with_name(prefix.name + ".idx").is_file()]
        if missing or not prefixes:
            lacks = f"{missing[0]}.idx is not there" if missing else "no .idx file"
            raise DataError(
                f"{key}={word}: {lacks}; give the path of a pair .bin and .idx without its ending"
            )
        found += prefixes
    return [prefix.absolute() for prefix in found]
