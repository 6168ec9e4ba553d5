"""Shards into the files of a dataset: one token file per corpus, one held-out token file, one card."""

import gzip
import hashlib
import lzma
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from types import TracebackType
from typing import Any

import numpy as np

from data.card import (
    CARD,
    HELD_OUT_TEXT,
    Card,
    CorpusCard,
    HeldOutCard,
    TokenFileCard,
    TokenizerCard,
    write_card,
)
from data.config import HELD_OUT, DataConfig
from data.durable import file_digest, named, sync
from data.indexed import read_indexed
from data.scan import Scan
from data.shards import ShardStore
from data.token_file import token_dtype
from data.tokenizer.files import write_files
from data.tokenizer.tokenizer import Tokenizer

_MAX_SEQUENCE_TOKENS = 1 << 30  # the index holds lengths as int32; a longer document is several sequences
_READ_BYTES = 4 << 20
_VERSIONS_OF = ("numpy", "sentencepiece", "tokenizers", "megatron-core")


class TokenFileWriter:
    """Writes one token file through Megatron-Core. On leaving, both files are on disk.

    Counts documents, tokens and bytes of text as it goes.
    """

    def __init__(
        self, prefix: Path, dtype: np.dtype, max_sequence_tokens: int = _MAX_SEQUENCE_TOKENS
    ) -> None:
        # Here and not above: it takes seconds to import.
        with warnings.catch_warnings():
            # It warns of GPU packages that writing a file has no use for.
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._bin_path = prefix.with_name(prefix.name + ".bin")
        self._idx_path = prefix.with_name(prefix.name + ".idx")
        self._max_sequence_tokens = max_sequence_tokens
        self._builder = IndexedDatasetBuilder(str(self._bin_path), dtype=dtype.type)
        self._documents = self._tokens = self._bytes = 0

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is not None:
            with suppress(OSError):  # what could not be written shows up again on closing
                self._builder.data_file.close()
            return
        with named(self._bin_path):
            self._builder.finalize(str(self._idx_path))
        sync(self._bin_path)
        sync(self._idx_path)

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document. Raises OSError."""
        import torch

        with named(self._bin_path):
            for start in range(0, len(tokens), self._max_sequence_tokens):
                part = tokens[start : start + self._max_sequence_tokens]
                self._builder.add_item(torch.from_numpy(part.copy()))
        self._builder.end_document()
        self._documents += 1
        self._tokens += len(tokens)
        self._bytes += text_bytes

    def card(self) -> TokenFileCard:
        """Counts and digests, once the writer is left. Raises OSError."""
        return TokenFileCard(
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._bytes,
            bin_digest=file_digest(self._bin_path),
            idx_digest=file_digest(self._idx_path),
        )


def merge(
    store: ShardStore,
    shards: Mapping[str, Sequence[str]],
    scan: Scan,
    config: DataConfig,
    tokenizer: Tokenizer,
    out: Path,
    advance: Callable[[int], None],
) -> Card:
    """Write the files of the dataset into the empty directory `out`, the card last. The card.

    `shards` names the shards of each corpus in order. `advance` is told the bytes of text merged.

    Raises OSError, and DataError for a shard that is not what was recorded.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    corpora: dict[str, CorpusCard] = {}
    given_bytes = 0
    with ExitStack() as stack:
        held_out = stack.enter_context(TokenFileWriter(out / HELD_OUT, dtype))
        text = stack.enter_context((out / HELD_OUT_TEXT).open("wb"))

        def add(tokens: np.ndarray, size: int) -> None:
            nonlocal given_bytes
            held_out.add(tokens.astype(dtype), size)
            # What opens a document is given where it is no token of its own.
            if tokenizer.bos is None or int(tokens[0]) != tokenizer.bos:
                given_bytes += len(tokenizer.decode(tokens[:1]))

        for name, shard_names in shards.items():
            hashes = [np.empty((0, 32), np.uint8)]
            changed, example = 0, ""
            with TokenFileWriter(out / name, dtype) as training:
                for shard_name in shard_names:
                    shard = store.read(shard_name)
                    for (tokens, is_held_out), size in zip(shard.documents(), shard.sizes, strict=True):
                        (add if is_held_out else training.add)(tokens, int(size))
                    with named(out / HELD_OUT_TEXT):
                        text.write(shard.held_out_text.tobytes())
                    hashes.append(shard.hashes)
                    changed += int(shard.changed.sum())
                    example = example or shard.changed_example.tobytes().decode()
                    advance(int(shard.sizes.sum()))
            found = _corpus_card(training.card(), scan, name, np.concatenate(hashes))
            corpora[name] = found.model_copy(update={"changed": changed, "changed_example": example})
        for name in sorted(config.corpora.keys() - shards.keys()):
            corpora[name] = read_indexed(name, config, tokenizer, out, add, text)
    sync(out / HELD_OUT_TEXT)
    write_files(tokenizer.files, out)
    card = Card(
        tokenizer=TokenizerCard(
            digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            parses_special=bool(scan.settings.get("data.tokenizer.parses_special")),
        ),
        # By name, so that a config means the same however it is written.
        corpora=dict(sorted(corpora.items())),
        held_out=_held_out_card(held_out.card(), out / HELD_OUT_TEXT, given_bytes),
        settings=scan.settings,
        versions=_versions(),
    )
    write_card(card, out / CARD)
    return card


def compressed_sizes(path: Path) -> tuple[int, int]:
    """Bytes of a file after gzip at level 9 and xz at preset 9, each as one stream. Raises OSError."""
    counter = _Counter()
    xz = lzma.LZMACompressor(preset=9)
    xz_bytes = 0
    with path.open("rb") as stream, gzip.GzipFile("", "wb", 9, counter, mtime=0) as compressed:
        while block := stream.read(_READ_BYTES):
            compressed.write(block)
            xz_bytes += len(xz.compress(block))
    return counter.bytes, xz_bytes + len(xz.flush())


class _Counter:
    def __init__(self) -> None:
        self.bytes = 0

    def write(self, content: bytes) -> int:
        self.bytes += len(content)
        return len(content)

    def flush(self) -> None:
        """Nothing is kept."""


def _corpus_card(written: TokenFileCard, scan: Scan, name: str, hashes: np.ndarray) -> CorpusCard:
    found = scan.corpora[name]
    # Big-endian words compare as the bytes do; lexsort takes the most significant key last.
    words = np.ascontiguousarray(hashes).view(">u8")
    order = np.lexsort(words.T[::-1])
    return CorpusCard(
        **written.model_dump(),
        bad=found.bad,
        empty=found.empty,
        bad_examples=found.bad_examples,
        empty_examples=found.empty_examples,
        passed_over=scan.passed_over[name],
        source_documents=found.documents,
        source_bytes=found.bytes,
        source_digest=hashlib.sha256(hashes[order].tobytes()).hexdigest(),
    )


def _held_out_card(written: TokenFileCard, text: Path, given_bytes: int) -> HeldOutCard:
    gzip_bytes, xz_bytes = compressed_sizes(text)
    return HeldOutCard(
        **written.model_dump(),
        given_bytes=given_bytes,
        text_digest=file_digest(text),
        gzip_bytes=gzip_bytes,
        xz_bytes=xz_bytes,
    )


def _versions() -> dict[str, Any]:
    return {"python": python_version()} | {name: version(name) for name in _VERSIONS_OF}
