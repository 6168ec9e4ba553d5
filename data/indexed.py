"""Corpora of Megatron's token files: read where they lie, nothing copied but what is held out."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from conf.errors import DataError
from data.card import CorpusCard, SourceFile, TokenFileCard
from data.config import CorpusConfig, DataConfig
from data.durable import file_digest, named, write_whole
from data.shards import content_hash, is_held_out
from data.token_file import TokenFile
from data.token_stream import TokenStream, token_file_prefixes
from data.tokenizer.tokenizer import Tokenizer

Add = Callable[[np.ndarray, int], None]


def read_indexed(
    name: str, config: DataConfig, tokenizer: Tokenizer, out: Path, add: Add, text: IO[bytes]
) -> CorpusCard:
    """Reads every token once; the card of the corpus. What is held out goes to `add` and `text`.

    A document is held out by the hash of its tokens. `add` is told tokens and bytes of text. Writes
    NAME.held_out.npy into `out`.

    Raises DataError for damaged files, for ids that the tokenizer does not have, and without a training part.
    """
    corpus = config.corpora[name]
    files = [TokenFile(prefix) for prefix in token_file_prefixes(name, corpus)]
    held, before, ended = list[int](), 0, 0
    for file in files:
        for index in range(file.num_documents):
            tokens = file.document(index)
            if not tokens.size:
                continue
            _check(tokens, file, index, tokenizer)
            ended += int(tokens[-1]) == tokenizer.eos
            if config.held_out and is_held_out(
                content_hash(tokens.astype(np.int64).tobytes()), config.held_out
            ):
                content = tokenizer.decode(tokens)
                add(tokens, len(content))
                with named(out):
                    text.write(content)
                held.append(before + index)
        before += file.num_documents
    left_out = np.array(held, np.int64)
    buffer = io.BytesIO()
    np.save(buffer, left_out)
    write_whole(out / _held_out_name(name), buffer.getvalue())
    return _card(name, corpus, files, left_out, ended)


def open_stream(directory: Path, name: str, card: CorpusCard) -> TokenStream:
    """The training part of a corpus that was read so. Raises DataError where its files are others now."""
    path = directory / _held_out_name(name)
    try:
        left_out = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot read: {error}; prepare the dataset again") from error
    files = [TokenFile(Path(source.prefix)) for source in card.files]
    for file, source in zip(files, card.files, strict=True):
        if (file.num_documents, file.num_tokens) != (source.documents, source.tokens):
            raise DataError(
                f"{file.idx_path}: found {file.num_documents} documents, {file.num_tokens} tokens; expected "
                f"{source.documents}, {source.tokens}: the files changed, prepare them as another dataset"
            )
    count = sum(file.num_documents for file in files)
    if (
        left_out.dtype != np.int64
        or left_out.ndim != 1
        or (left_out.size and not 0 <= left_out[0] <= left_out[-1] < count)
    ):
        raise DataError(
            f"{path}: does not name documents of the {count} there are; prepare the dataset again"
        )
    stream = TokenStream(files, left_out)
    if (stream.num_documents, stream.num_tokens) != (card.documents, card.tokens):
        raise DataError(
            f"{path}: leaves {stream.num_documents} documents, {stream.num_tokens} tokens; expected "
            f"{card.documents}, {card.tokens}; prepare the dataset again"
        )
    return stream


def expected_digests(directory: Path, name: str, card: TokenFileCard) -> Iterator[tuple[Path, str]]:
    """Every file of tokens with its digest by the card."""
    sources = card.files if isinstance(card, CorpusCard) else []
    for source in sources:
        yield Path(f"{source.prefix}.bin"), source.bin_digest
        yield Path(f"{source.prefix}.idx"), source.idx_digest
    if not sources:
        yield directory / f"{name}.bin", card.bin_digest
        yield directory / f"{name}.idx", card.idx_digest


def _held_out_name(name: str) -> str:
    return f"{name}.held_out.npy"


def _check(tokens: np.ndarray, file: TokenFile, index: int, tokenizer: Tokenizer) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= tokenizer.vocab_size:
        found = low if low < 0 else high
        raise DataError(
            f"{file.bin_path}: document {index} holds id {found}, and data.tokenizer.model has ids 0 to "
            f"{tokenizer.vocab_size - 1}; name the tokenizer that wrote them"
        )


def _card(
    name: str, corpus: CorpusConfig, files: list[TokenFile], left_out: np.ndarray, ended: int
) -> CorpusCard:
    stream = TokenStream(files, left_out)
    if not stream.num_tokens:
        raise DataError(
            f"data.corpora.{name}.source={corpus.source}: no training documents: {len(left_out)} held out of "
            f"{sum(file.num_documents for file in files)}; add documents or lower data.held_out"
        )
    sources = [
        SourceFile(
            prefix=str(file.bin_path.with_suffix("")),
            documents=file.num_documents,
            tokens=file.num_tokens,
            bin_digest=file_digest(file.bin_path),
            idx_digest=file_digest(file.idx_path),
        )
        for file in files
    ]
    documents = sum(file.num_documents for file in files)
    without = documents - ended
    said = [f"end tokens: {without:,} of {documents:,} documents do not end with the one of the tokenizer"]
    return CorpusCard(
        documents=stream.num_documents,
        tokens=stream.num_tokens,
        bytes=0,
        bin_digest=_joined([source.bin_digest for source in sources]),
        idx_digest=_joined(
            [*(source.idx_digest for source in sources), xxhash.xxh3_128_hexdigest(left_out.tobytes())]
        ),
        bad=0,
        empty=0,
        bad_examples=[],
        passed_over=said if without else [],
        source_documents=documents,
        source_bytes=0,
        source_digest=_joined([source.bin_digest for source in sources]),
        files=sources,
    )


def _joined(digests: list[str]) -> str:
    return xxhash.xxh3_128_hexdigest("".join(digests).encode())
