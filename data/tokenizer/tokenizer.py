"""What every tokenizer of a dataset can do: text to ids, ids to text, and where documents begin and end."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from conf.errors import DataError


class Ends(NamedTuple):
    """The tokens that begin and end a document, by name or id; None is what the tokenizer's own files say.

    bos: the empty name is no token at all.
    """

    bos: str | int | None = None
    eos: str | int | None = None


class Tokenizer(ABC):
    """A loaded tokenizer.

    files: what it was read from, by name; enough to load it again. digest: sha256 of what gives ids their
    meaning. vocab_size: one more than the highest id. bos: id before a document, None without one. eos: id
    after it.
    """

    files: Mapping[str, bytes]
    digest: str
    vocab_size: int
    bos: int | None
    eos: int

    def encode(self, content: bytes) -> np.ndarray:
        """Ids of a text, int32, without begin and end. Raises DataError as `encode_batch` does."""
        return self.encode_batch([content])[0]

    @abstractmethod
    def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text, int32, without begin and end. Raises DataError for bytes it cannot write."""

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes that `ids` stand for; begin and end stand for none.

        Raises IndexError for an id beyond the vocabulary.
        """

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""

    @abstractmethod
    def name_of(self, id: int) -> str:
        """The name of an id. Raises IndexError beyond the vocabulary."""

    def take_ends(self, ends: Ends, origin: str) -> None:
        """Sets bos and eos to those asked for. Mutates. Raises DataError for tokens that do not exist."""
        if ends.bos is not None:
            self.bos = None if ends.bos == "" else self._end("bos", ends.bos, origin)
        if ends.eos is not None:
            self.eos = self._end("eos", ends.eos, origin)
        if self.eos < 0:
            raise DataError(
                f"{origin}: says no token that ends a text; name one of its tokens in data.tokenizer.eos"
            )

    def _end(self, key: str, asked: str | int, origin: str) -> int:
        found = self.id_of(asked) if isinstance(asked, str) else asked
        if found is None or not 0 <= found < self.vocab_size:
            raise DataError(f"data.tokenizer.{key}={asked}: {origin} has no such token; name one that it has")
        return found
