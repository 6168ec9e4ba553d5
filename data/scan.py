"""The first pass over the documents: count, find what is wrong early, and train the tokenizer on a sample."""

import hashlib
import heapq
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from conf.errors import DataError
from data.config import MEGATRON, DataConfig
from data.documents import read_documents
from data.files import find_files
from data.shards import content_hash, is_held_out
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.training import train_tokenizer

_SHOWN_EXAMPLES = 20
_EXCERPT_BYTES = 64 << 10  # of one document in the sample, so that no single one shapes the vocabulary
_SENTENCE_CHARACTERS = 4000


class CorpusScan(BaseModel):
    """What one corpus holds. `order_digest` is the sha256 over document hashes as they were read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: int
    bytes: int
    bad: int
    empty: int
    bad_examples: list[str]
    empty_examples: list[str]
    order_digest: str


class Scan(BaseModel):
    """The first pass as it is kept for a resumed run, with the settings that it belongs to.

    passed_over has lines for the files of each corpus that are not read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    tokenizer_digest: str
    corpora: dict[str, CorpusScan]
    # Not in CorpusScan: what is not read may change until the second pass.
    passed_over: dict[str, list[str]]


class DocumentReader:
    """Reads the corpora of a config, counts what they hold, and stops at too many bad documents.

    Corpora come in the order of their names, so that a config means the same however it is written.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._bad = 0
        self.scans: dict[str, CorpusScan] = {}

    @property
    def names(self) -> list[str]:
        """Names of the corpora that have documents to tokenise, in the order of the dataset."""
        return sorted(name for name, corpus in self._config.corpora.items() if corpus.kind != MEGATRON)

    def usable(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        """Content and sha256 of each document that is neither empty nor bad; the counts, once exhausted.

        Raises DataError at one bad document more than data.max_bad_documents allows.
        """
        documents, size, bad, empty, examples, empty_examples = 0, 0, 0, 0, [], []
        order = hashlib.sha256()
        for content, origin, fault in read_documents(name, self._config.corpora[name]):
            if fault:
                bad += 1
                examples.append(f"{origin}: {fault}")
                self._check_bad(name, examples[-1])
            elif not content:
                empty += 1
                if empty <= _SHOWN_EXAMPLES:
                    empty_examples.append(origin)
            else:
                digest = content_hash(content)
                order.update(digest)
                documents += 1
                size += len(content)
                yield content, digest
        self.scans[name] = CorpusScan(
            documents=documents,
            bytes=size,
            bad=bad,
            empty=empty,
            bad_examples=examples[:_SHOWN_EXAMPLES],
            empty_examples=empty_examples,
            order_digest=order.hexdigest(),
        )

    def _check_bad(self, name: str, example: str) -> None:
        self._bad += 1
        allowed = self._config.max_bad_documents
        if self._bad > allowed:
            raise DataError(
                f"{example} (corpus {name}); bad documents: found {self._bad}, allowed "
                f"data.max_bad_documents={allowed}; fix it, leave it out, or raise the limit"
            )


class Sample:
    """A sample of documents up to a number of bytes: those with the smallest hash, whatever their order."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._heap: list[tuple[int, bytes]] = []  # the largest key on top, by its negative

    def add(self, content: bytes, digest: bytes) -> None:
        """Offer a document with its sha256."""
        excerpt = content[:_EXCERPT_BYTES]
        # Hashed again: the hash itself already decides the held-out split.
        key = int.from_bytes(hashlib.sha256(b"sample" + digest).digest(), "big")
        heapq.heappush(self._heap, (-key, excerpt))
        self._bytes += len(excerpt)
        while self._bytes - len(self._heap[0][1]) >= self._max_bytes:
            self._bytes -= len(heapq.heappop(self._heap)[1])

    def sentences(self) -> Iterator[str]:
        """The sample in pieces that sentencepiece takes, at most its bytes in all."""
        left = self._max_bytes
        for _, excerpt in sorted(self._heap, reverse=True):
            text = excerpt[:left].decode("utf-8", "ignore")  # a cut may fall inside a character
            left -= len(excerpt)
            for start in range(0, len(text), _SENTENCE_CHARACTERS):
                yield text[start : start + _SENTENCE_CHARACTERS]


def scan(
    config: DataConfig, settings: dict[str, Any], given: Tokenizer | None, advance: Callable[[int], None]
) -> tuple[Scan, Tokenizer]:
    """Read every document once: its counts, and the tokenizer, the given one or one trained on a sample.

    Each corpus gives the same share of the sample and held-out documents none. `advance` is told the
    bytes read.

    Raises DataError for sources, documents or a tokenizer that cannot be used, and for an empty split.
    """
    reader = DocumentReader(config)
    samples = {
        name: Sample(config.tokenizer.train_bytes // max(1, len(reader.names))) for name in reader.names
    }
    held_out_documents = 0
    for name in reader.names:
        training_documents = 0
        for content, digest in reader.usable(name):
            if is_held_out(digest, config.held_out):
                held_out_documents += 1
            else:
                training_documents += 1
                if given is None:
                    samples[name].add(content, digest)
            advance(len(content))
        _check_training_part(name, training_documents, reader.scans[name], config)
    has_tokens = len(reader.names) < len(config.corpora)
    if config.held_out and not held_out_documents and not has_tokens:
        total = sum(found.documents for found in reader.scans.values())
        raise DataError(
            f"data.held_out={config.held_out} picks none of {total} documents; raise it or set it to 0"
        )
    sentences = (text for name in reader.names for text in samples[name].sentences())
    tokenizer = given or train_tokenizer(sentences, config.tokenizer.vocab_size, config.tokenizer.train)
    return Scan(
        settings=settings,
        tokenizer_digest=tokenizer.digest,
        corpora=reader.scans,
        passed_over={name: _passed_over(name, config) for name in reader.names},
    ), tokenizer


def read_scan(path: Path) -> Scan | None:
    """A kept first pass, or None when there is none that can be used."""
    try:
        return Scan.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _passed_over(name: str, config: DataConfig) -> list[str]:
    corpus = config.corpora[name]
    return [] if corpus.kind == "hub" else find_files(name, corpus).passed_over


def _check_training_part(name: str, documents: int, found: CorpusScan, config: DataConfig) -> None:
    if documents:
        return
    source = config.corpora[name].source
    raise DataError(
        f"data.corpora.{name}.source={source}: no training documents: found {found.documents} held out, "
        f"{found.empty} empty, {found.bad} bad; add documents or lower data.held_out"
    )
