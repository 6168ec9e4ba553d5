"""A sentencepiece tokenizer that gives back every byte it was given, text or not."""

import hashlib
import io
import re
import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from conf.errors import DataError

MAX_MODEL_BYTES = 64 << 20

# What sentencepiece would not give back as it was: its own mark for a space, NUL, and bytes that are
# not UTF-8, which Python's surrogateescape shows as U+DC80 to U+DCFF. They go through byte pieces.
_AS_BYTES = re.compile("([\u2581\0\udc80-\udcff]+)")
# Documents are encoded in blocks that end at a newline: twice as fast as whole and in bounded memory, for
# about fifteen tokens more in a million.
_BLOCK_BYTES = 1 << 12
_REQUIRED_CHARACTERS = "\t\n\r" + string.digits + string.ascii_letters + string.punctuation
_PROBE = " a  b\t\tc\n\n    d\r\n\u2581 \ufb01 \uff21 e\u0301 \U0001f600\0 ".encode() + b"\xff\xc3\x28"


class Tokenizer:
    """A loaded sentencepiece model. Encoding then decoding is the identity on any bytes."""

    def __init__(self, model: bytes, origin: str = "tokenizer") -> None:
        """Raises DataError when `model` is no sentencepiece model, or not one that keeps every byte."""
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError) as error:
            raise DataError(_not_a_model(origin, model)) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        self._byte_ids = self._find_byte_ids(origin)
        if self.bos < 0 or self.eos < 0:
            raise DataError(f"{origin}: begin id {self.bos}, end id {self.eos}; documents need both")
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise DataError(
                f"{origin}: the model alters text (normalisation, dummy prefix or whitespace); "
                "use one trained with identity normalisation, or data.tokenizer.model=null"
            )

    def _find_byte_ids(self, origin: str) -> np.ndarray:
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        missing = [byte for byte, id in enumerate(ids) if not self._processor.is_byte(id)]
        if missing:
            raise DataError(
                f"{origin}: {len(missing)} of 256 byte pieces are missing; use a model trained with "
                "byte_fallback, or data.tokenizer.model=null"
            )
        return np.array(ids, np.int32)

    def encode(self, content: bytes) -> np.ndarray:
        """Piece ids of any bytes, int32, without begin and end."""
        return self.encode_batch([content])[0]

    def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """Piece ids of each content, int32, without begin and end."""
        return [self._encode(content) for content in contents]

    def _encode(self, content: bytes) -> np.ndarray:
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


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a sentencepiece model file. Raises DataError when it cannot be used."""
    return Tokenizer(_read_model(path), str(path))


def model_digest(path: Path) -> str:
    """sha256 of a model file, as `Tokenizer.digest` has it. Raises DataError when it cannot be read."""
    return hashlib.sha256(_read_model(path)).hexdigest()


def _read_model(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise DataError(f"{path}: {size} bytes, a model has at most {MAX_MODEL_BYTES}; check the path")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the model: {error.strerror}; check the path") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-fallback BPE tokenizer with exactly `vocab_size` pieces; the same texts give the same bytes.

    Words, digits and punctuation never share a piece; a run of spaces or newlines may be one piece.

    Raises DataError when the texts are too few for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=True,
            split_by_unicode_script=True,
            split_by_number=True,
            split_digits=True,
            max_sentencepiece_length=24,
            # Characters rarer than this cost a piece each and are as well spelt in bytes.
            character_coverage=0.9995,
            required_chars=_REQUIRED_CHARACTERS,
            max_sentence_length=1 << 20,
            # One thread: the model must not depend on the machine.
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_cannot_train(vocab_size, str(error))) from error
    return Tokenizer(model.getvalue(), "the trained tokenizer")


def _cannot_train(vocab_size: int, message: str) -> str:
    limit = re.search(r"value <= (\d+)", message)
    if limit:
        found = f"the text has pieces for only {limit[1]}"
        fix = f"set it to {limit[1]} or less, or add documents"
    else:
        found, fix = f"sentencepiece says: {message.splitlines()[0]}", "raise it, or add documents"
    return f"data.tokenizer.vocab_size={vocab_size}: {found}; {fix}"


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
