"""Sentencepiece models: those that give back every byte, text or not, and all others as they are."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import sentencepiece

from conf.errors import DataError
from conf.tokenizer_files import SENTENCEPIECE
from data.tokenizer.tokenizer import Tokenizer

# What sentencepiece would not give back as it was: its own mark for a space, NUL, and bytes that are
# not UTF-8, which Python's surrogateescape shows as U+DC80 to U+DCFF. They go through byte pieces.
_AS_BYTES = re.compile("([\u2581\0\udc80-\udcff]+)")
# Documents are encoded in blocks that end at a newline: twice as fast as whole and in bounded memory, for
# about fifteen tokens more in a million.
_BLOCK_BYTES = 1 << 12
_PROBE = " a  b\t\tc\n\n    d\r\n\u2581 \ufb01 \uff21 e\u0301 \U0001f600\0 ".encode() + b"\xff\xc3\x28"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    keeps_bytes: encoding then decoding is the identity on any bytes, as all 256 byte pieces are there and
    nothing is normalised. Other models encode a text as a whole, as sentencepiece itself does.
    """

    def __init__(self, files: Mapping[str, bytes], origin: str = "tokenizer") -> None:
        """`files` by name, tokenizer.model among them. Raises DataError when that one is damaged."""
        self.files, model = dict(files), files[SENTENCEPIECE]
        self.digest = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError) as error:
            raise DataError(_not_a_model(origin, model)) from error
        self.vocab_size = self._processor.vocab_size()
        bos = self._processor.bos_id()
        self.bos, self.eos = bos if bos >= 0 else None, self._processor.eos_id()
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_ids = np.array(ids, np.int32)
        has_bytes = all(map(self._processor.is_byte, ids))
        self.keeps_bytes = has_bytes and self._spelt(self._encode_blocks(_PROBE)) == _PROBE

    def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """Piece ids of each content, int32, without begin and end."""
        return [self._encode(content) for content in contents]

    def _encode(self, content: bytes) -> np.ndarray:
        if self.keeps_bytes:
            return self._encode_blocks(content)
        try:
            return np.array(self._processor.encode(content.decode()), np.int32)
        except UnicodeDecodeError as error:
            raise DataError(
                f"text is not UTF-8 at byte {error.start}, and the tokenizer takes text"
            ) from error

    def _encode_blocks(self, content: bytes) -> np.ndarray:
        parts = [np.empty(0, np.int32)]
        for block in _blocks(content):
            text = block.decode("utf-8", "surrogateescape")
            # The pattern is a group, so the odd parts are what matched it.
            for index, part in enumerate(_AS_BYTES.split(text)):
                if index % 2:
                    raw = np.frombuffer(part.encode("utf-8", "surrogateescape"), np.uint8)
                    parts.append(self._byte_ids[raw])
                elif part:
                    parts.append(np.array(self._processor.encode(part), np.int32))
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes that `ids` stand for; begin and end stand for none.

        Raises IndexError for an id beyond the vocabulary.
        """
        if self.keeps_bytes:
            return self._spelt(ids)
        found = [int(id) for id in ids]
        if any(not 0 <= id < self.vocab_size for id in found):
            raise IndexError(f"an id beyond {self.vocab_size - 1}")
        return self._processor.decode(found).encode()

    def id_of(self, token: str) -> int | None:
        """The id of a piece by its name; None where there is none."""
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None

    def name_of(self, id: int) -> str:
        """The piece of an id. Raises IndexError beyond the vocabulary."""
        return self._processor.id_to_piece(id)

    def _spelt(self, ids: Iterable[int] | np.ndarray) -> bytes:
        pieces = self._piece_bytes
        return b"".join([pieces[id] for id in ids])

    @cached_property
    def _piece_bytes(self) -> list[bytes]:
        processor, pieces = self._processor, []
        for id in range(self.vocab_size):
            piece = processor.id_to_piece(id)
            if processor.is_byte(id):
                pieces.append(bytes([int(piece[3:5], 16)]))
            elif processor.is_control(id) or processor.is_unknown(id):
                pieces.append(b"")
            else:
                pieces.append(piece.replace("\u2581", " ").encode())
        return pieces


def _not_a_model(origin: str, model: bytes) -> str:
    return f"{origin}: {len(model)} bytes that are no sentencepiece model; check the path or fetch it again"


def _blocks(content: bytes) -> Iterable[bytes]:
    start = 0
    while len(content) - start > _BLOCK_BYTES:
        newline = content.rfind(b"\n", start, start + _BLOCK_BYTES)
        stop = newline + 1 if newline >= 0 else start + _BLOCK_BYTES
        yield content[start:stop]
        start = stop
    yield content[start:]
