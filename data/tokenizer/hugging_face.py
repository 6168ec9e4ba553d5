"""Tokenizers in the form of Hugging Face: a tokenizer.json, and what files beside it say of its tokens."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from conf.errors import DataError
from conf.tokenizer_files import SPECIAL_MAP, TOKENIZER_CONFIG, TOKENIZER_JSON
from data.tokenizer.tokenizer import Tokenizer

# What says which ids a text gets. How they are padded, cut or put between special tokens is none of it.
_MEANING = ("added_tokens", "normalizer", "pre_tokenizer", "model")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, run by the library `tokenizers`.

    parses_special: special tokens that stand in a text become their ids; else they are text like any other,
    so that no document can end itself. Added tokens that are not special always become theirs.
    """

    def __init__(self, files: Mapping[str, bytes], origin: str, *, parses_special: bool = False) -> None:
        """`files` by name, tokenizer.json among them; eos is -1 where none of them names it.

        Raises DataError for files that are damaged or do not fit each other.
        """
        self.files = dict(files)
        self._origin = origin
        self._tokenizer = _loaded(files[TOKENIZER_JSON], f"{origin}/{TOKENIZER_JSON}")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = not parses_special
        self._parses_special = parses_special
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise DataError(f"{origin}/{TOKENIZER_JSON}: has no tokens; fetch it again")
        config = read_json(files.get(TOKENIZER_CONFIG, b"{}"), f"{origin}/{TOKENIZER_CONFIG}")
        named = read_json(files.get(SPECIAL_MAP, b"{}"), f"{origin}/{SPECIAL_MAP}") | config
        self.bos = self._named(named, "bos_token", origin)
        if named.get("add_bos_token") is False:
            self.bos = None
        eos = self._named(named, "eos_token", origin)
        self.eos = -1 if eos is None else eos

    @cached_property
    def digest(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """sha256 of what gives ids their meaning; workers that only encode do not wait for it."""
        return meaning_digest(read_json(self.files[TOKENIZER_JSON], f"{self._origin}/{TOKENIZER_JSON}"))

    def _named(self, named: Mapping[str, Any], key: str, origin: str) -> int | None:
        token = named.get(key)
        name = token.get("content") if isinstance(token, dict) else token
        if name is None:
            return None
        found = self._tokenizer.token_to_id(name) if isinstance(name, str) else None
        if found is None:
            raise DataError(
                f"{origin}/{TOKENIZER_CONFIG}: {key} is {name!r}, which is no token of {TOKENIZER_JSON}; "
                "fetch both again"
            )
        return found

    def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text, int32, without begin and end. Raises DataError for bytes that are not UTF-8."""
        try:
            texts = [content.decode() for content in contents]
        except UnicodeDecodeError as error:
            raise DataError(
                f"text is not UTF-8 at byte {error.start}, and the tokenizer takes text"
            ) from error
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes that `ids` stand for; special tokens stand for none unless they are read in texts.

        Raises IndexError for an id beyond the vocabulary.
        """
        if self._bytes_of is not None:
            table = self._bytes_of
            return b"".join([table[id] for id in ids])
        found = [int(id) for id in ids]
        if any(not 0 <= id < self.vocab_size for id in found):
            raise IndexError(f"an id beyond {self.vocab_size - 1}")
        return self._tokenizer.decode(found, skip_special_tokens=not self._parses_special).encode()

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""
        return self._tokenizer.token_to_id(token)

    def name_of(self, id: int) -> str:
        """The token of an id. Raises IndexError beyond the vocabulary."""
        if (found := self._tokenizer.id_to_token(id)) is None:
            raise IndexError(f"an id beyond {self.vocab_size - 1}")
        return found

    @cached_property
    def _bytes_of(self) -> list[bytes] | None:
        """The bytes of every id where ids stand for bytes one by one; None where neighbours matter."""
        decoder = json.loads(self._tokenizer.to_str())["decoder"]
        if decoder is None or decoder["type"] != "ByteLevel":
            return None
        table, byte_of = [b""] * self.vocab_size, {char: byte for byte, char in byte_characters().items()}
        added = self._tokenizer.get_added_tokens_decoder()
        for token, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id not in added:
                table[id] = (
                    bytes(byte_of[char] for char in token) if {*token} <= byte_of.keys() else token.encode()
                )
            elif self._parses_special or not added[id].special:
                table[id] = token.encode()
        return table


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies, that of GPT-2."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def meaning_digest(content: Mapping[str, Any]) -> str:
    """sha256 of what gives ids their meaning in a tokenizer.json, the same however a library writes it."""
    meaning = {name: content.get(name) for name in _MEANING}
    model = meaning["model"]
    if isinstance(model, dict):
        # Releases differ in what they write of options that are off, and in how merges are written.
        model = {name: value for name, value in model.items() if value not in (None, False)}
        if isinstance(model.get("merges"), list):
            model["merges"] = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        meaning["model"] = model
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def read_json(content: bytes, origin: str) -> dict[str, Any]:
    """A file of JSON. Raises DataError for one that is damaged."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {str(error).splitlines()[0]}; fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{origin}: a JSON {type(found).__name__}, not an object; fetch it again")
    return found


def _loaded(content: bytes, origin: str) -> Any:
    from tokenizers import Tokenizer as Loaded

    try:
        return Loaded.from_buffer(content)
    # The library raises Exception itself, and for some damage what its Rust code panics with.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{origin}: no tokenizer: {why}; fetch it again") from error
