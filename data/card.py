"""The card of a prepared dataset: what is in it, by count and by digest, and the settings that made it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conf.errors import DataError
from data.config import HELD_OUT, READ, DataConfig
from data.durable import refuse_not_finite, sha256_of, write_whole
from data.tokenizer.files import load_tokenizer
from data.tokenizer.tokenizer import Ends, Tokenizer

CARD = "card.json"
HELD_OUT_TEXT = "held_out.txt"

_MAX_CARD_BYTES = 16 << 20
_DIGEST = "sha256"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TokenFileCard(_Record):
    """One `.bin/.idx` pair. Digests are xxh3_128 of the files; `bytes` is of the text, not the tokens."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    bin_digest: str
    idx_digest: str


class SourceFile(_Record):
    """A pair of token files of others that is read where it lies; `prefix` is its absolute path."""

    prefix: str
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bin_digest: str
    idx_digest: str


class CorpusCard(TokenFileCard):
    """The training part of one corpus, what its source held, and what of it was not read, a line a reason."""

    bad: int = Field(ge=0)
    empty: int = Field(ge=0)
    bad_examples: list[str]
    # Cards that were written before these were there have none.
    empty_examples: list[str] = []
    passed_over: list[str] = []
    source_documents: int = Field(ge=0)
    source_bytes: int = Field(ge=0)
    # Documents whose text comes back from their tokens with other bytes, as where it was normalised.
    changed: int = Field(default=0, ge=0)
    changed_example: str = ""
    # Of a corpus that is read where it lies: its files; the digests above are over all of them, and bytes of
    # its text are not known. NAME.held_out.npy has the documents that are held out, counted over all files.
    files: list[SourceFile] = []
    # sha256 over the sorted sha256 of every usable document: independent of names and of order.
    source_digest: str


class HeldOutCard(TokenFileCard):
    """The held-out part of all corpora, and how far two general compressors get on its text.

    given_bytes are of the tokens that nothing predicts: the first of each document, where there is no bos.
    """

    given_bytes: int = Field(default=0, ge=0)
    text_digest: str
    gzip_bytes: int = Field(ge=0)
    xz_bytes: int = Field(ge=0)


class TokenizerCard(_Record):
    """The tokenizer that wrote the tokens.

    `digest` is the sha256 of its sentencepiece model, or of what gives ids their meaning in its
    tokenizer.json; bos is None where documents begin with no token of their own.
    """

    digest: str
    vocab_size: int = Field(gt=0)
    bos: int | None = Field(ge=0)
    eos: int = Field(ge=0)
    parses_special: bool = False

    @property
    def ends(self) -> Ends:
        """The tokens around a document."""
        return Ends("" if self.bos is None else self.bos, self.eos)

    def load(self, directory: Path) -> Tokenizer:
        """The tokenizer itself, from a directory that has its files. Raises DataError."""
        return load_tokenizer(directory, self.ends, parses_special=self.parses_special)


class Card(_Record):
    """All that a prepared dataset says about itself."""

    format: Literal[1] = 1
    tokenizer: TokenizerCard
    corpora: dict[str, CorpusCard] = Field(min_length=1)
    held_out: HeldOutCard
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """sha256 over the digests of the tokens and the tokenizer: the same for the same training data."""
        content = {
            "tokenizer": self.tokenizer.digest,
            "held_out": [self.held_out.bin_digest, self.held_out.idx_digest],
            # A list: the order of the corpora is part of the order of the data.
            "corpora": [[name, card.bin_digest, card.idx_digest] for name, card in self.corpora.items()],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def token_files(self) -> Iterator[tuple[str, TokenFileCard]]:
        """File prefix and card of every token file, the held-out one last."""
        yield from self.corpora.items()
        yield HELD_OUT, self.held_out


def write_card(card: Card, path: Path) -> None:
    """The card as JSON with a digest of its own: the same card gives the same bytes. Raises OSError."""
    fields = card.model_dump()
    write_whole(path, (json.dumps({_DIGEST: sha256_of(fields), **fields}, indent=1) + "\n").encode())


def read_card(directory: Path) -> Card:
    """The card of a prepared dataset. Raises DataError when there is none, or it is damaged.

    One without a digest of its own, as earlier versions wrote, is taken as it is.
    """
    path = directory / CARD
    try:
        size = path.stat().st_size
        if size > _MAX_CARD_BYTES:
            raise DataError(f"{path}: {size} bytes, a card has at most {_MAX_CARD_BYTES}; prepare it again")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read: {error.strerror}; run python -m data.prepare data.directory={directory}"
        ) from error
    try:
        return Card.model_validate_json(_checked(content, path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: damaged card: {key}: {first['msg']}; prepare the dataset again") from error


def _checked(content: bytes, path: Path) -> bytes:
    """The card without its digest. Raises DataError where they differ, and for what is no JSON."""
    try:
        fields = json.loads(content, parse_constant=refuse_not_finite)
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged card: no JSON ({why}); prepare the dataset again") from error
    if not isinstance(fields, dict) or _DIGEST not in fields:
        return content
    if fields.pop(_DIGEST) != sha256_of(fields):
        raise DataError(
            f"{path}: damaged card, or changed by hand: its {_DIGEST} is not the one written in it; prepare "
            "the dataset again, or copy it anew"
        )
    return json.dumps(fields).encode()


def content_settings(config: DataConfig, given: Tokenizer | None) -> dict[str, Any]:
    """The keys of `config` that decide what is in the token files, dotted as the user types them.

    `given` is the tokenizer of data.tokenizer.model, None where one is trained.
    """
    settings: dict[str, Any] = {"data.held_out": config.held_out}
    for name, corpus in sorted(config.corpora.items()):
        # The weight only says how often training visits a corpus.
        for key, value in corpus.model_dump(exclude={"weight", "epochs"}).items():
            settings[f"data.corpora.{name}.{key}"] = list(value) if isinstance(value, tuple) else value
    asked = config.tokenizer
    if given is None:
        settings["data.tokenizer.vocab_size"] = asked.vocab_size
        settings["data.tokenizer.model"] = None
        settings["data.tokenizer.train_bytes"] = asked.train_bytes
        if asked.train != "sentencepiece":
            settings["data.tokenizer.train"] = asked.train
    else:
        # The content and not the path: a copy of the same model elsewhere changes nothing.
        settings["data.tokenizer.model"] = f"{READ}{given.digest}"
        settings["data.tokenizer.bos"], settings["data.tokenizer.eos"] = given.bos, given.eos
    if asked.parses_special:
        settings["data.tokenizer.parses_special"] = True
    return settings


def difference(asked: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first settings that differ, as `key=asked, prepared with found`; empty when none does."""
    if asked.get("data.tokenizer.model") is not None and "data.tokenizer.eos" not in found:
        # Cards of earlier versions say the size of a given tokenizer, which its digest says as well.
        left_out = ("data.tokenizer.vocab_size", "data.tokenizer.bos", "data.tokenizer.eos")
        asked, found = ({k: v for k, v in side.items() if k not in left_out} for side in (asked, found))
    keys = [key for key in (*asked, *found) if asked.get(key) != found.get(key)]
    shown = [f"{key}={asked.get(key)}, prepared with {found.get(key)}" for key in dict.fromkeys(keys)]
    return "; ".join(shown[:3])
