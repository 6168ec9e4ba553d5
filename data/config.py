"""What the data floor is asked for: corpora, tokenizer, split, and where the prepared dataset lives."""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_validator, model_validator

from conf.compose import Config

HELD_OUT = "held_out"  # the name of the held-out token file, so no corpus may have it
STDLIB = "stdlib"  # the source that stands for the running Python's own standard library

READ = "sha256:"  # begins what a card says in place of data.tokenizer.model

SHORTEST_ROW = 8  # tokens

# 256 byte pieces, unknown, begin, end, every printable ASCII character, and room for merges.
_FEWEST_PIECES = 384

_CORPUS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FILE_KINDS = ("code", "text")

TokenizerKind = Literal["sentencepiece", "byte_level_bpe"]


# Endings of a source, those of compression taken off, and the kind that they say.
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
MEGATRON = "megatron"  # token files of Megatron, read where they lie
_FIELD_KINDS = ("jsonl", "parquet", "hub")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What files of a folder are called that hold rows of a kind.
ROW_ENDINGS = {
    "parquet": (".parquet",),
    "jsonl": tuple(
        ending + packed
        for ending, kind in _ENDINGS.items()
        if kind == "jsonl"
        for packed in ("", *COMPRESSED)
    ),
}


def _kind_of(source: str) -> str:
    """The kind that the ending of a source says. Raises ValueError for one that says none."""
    ending = "".join(suffix for suffix in PurePath(source).suffixes[-2:] if suffix not in COMPRESSED)
    if (kind := _ENDINGS.get(f".{ending.rpartition('.')[2]}")) is None:
        raise ValueError(f"kind is missing, and {source!r} does not say it; give kind=jsonl, text or another")
    return kind


def _blend(corpus: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The corpora of a source in Megatron's blend notation, "30 PREFIX 70 PREFIX"; None for any other."""
    source = corpus.get("source")
    words = source.split() if corpus.get("kind") == MEGATRON and isinstance(source, str) else []
    if len(words) < 2 or len(words) % 2:
        return None
    try:
        weights = [float(word) for word in words[::2]]
    except ValueError:
        return None
    pairs = zip(weights, words[1::2], strict=True)
    return [{**corpus, "source": prefix, "weight": weight} for weight, prefix in pairs]


class CorpusConfig(Config):
    """One named source of documents, and its share of the mixture."""

    kind: Literal["code", "text", "jsonl", "parquet", "hub", "megatron"]
    source: str = Field(min_length=1)
    suffixes: Annotated[tuple[str, ...], Strict(False)] = ()
    field: str | None = None
    split: str | None = None
    weight: float = Field(default=1.0, gt=0)
    epochs: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _says_its_kind_by_its_source(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        source = value.get("source")
        if "kind" not in value and isinstance(source, str):
            value = {**value, "kind": _kind_of(source)}
        if value.get("kind") in _FIELD_KINDS and "field" not in value:
            value = {**value, "field": "text"}
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "CorpusConfig":
        if self.weight != 1.0 and self.epochs is not None:
            raise ValueError(f"weight={self.weight} and epochs={self.epochs} both say how often; give one")
        if self.kind in _FILE_KINDS:
            if self.field is not None:
                raise ValueError(f"field={self.field!r} is only for jsonl, parquet and hub; set field=null")
        elif self.kind == MEGATRON:
            if self.field is not None or self.suffixes:
                raise ValueError("kind=megatron holds tokens: field and suffixes say nothing; leave them out")
        elif not self.field:
            raise ValueError(f"kind={self.kind} needs field, the name of the text column")
        elif self.suffixes:
            raise ValueError(f"suffixes are only for code and text; set suffixes=[] for kind={self.kind}")
        if self.kind == "hub" and not self.split:
            raise ValueError("kind=hub needs split, such as train")
        if self.kind != "hub" and self.split is not None:
            raise ValueError(f"split={self.split!r} is only for kind=hub; set split=null")
        if self.source == STDLIB and self.kind not in (*_FILE_KINDS, "hub"):
            raise ValueError(f"source=stdlib is a tree of files; set kind=code, not {self.kind}")
        return self

    @field_validator("suffixes")
    @classmethod
    def _suffixes_start_with_a_dot(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for suffix in value:
            if not suffix.startswith(".") or len(suffix) < 2:
                raise ValueError(f"suffix {suffix!r} must look like .py")
        return value


class TokenizerConfig(Config):
    """An existing tokenizer, or the kind and size of one to train."""

    vocab_size: int = Field(ge=2, le=1_000_000)
    model: str | None = Field(default=None, min_length=1)
    train: TokenizerKind = "sentencepiece"
    train_bytes: int = Field(default=4_000_000, ge=1_000, le=2_000_000_000)
    bos: str | None = None
    eos: str | None = Field(default=None, min_length=1)
    pattern: Literal["cl100k", "o200k", "qwen", "kimi"] | None = None
    parses_special: bool = False
    allows_changes: bool = False

    @model_validator(mode="after")
    def _is_about_one(self) -> "TokenizerConfig":
        if self.model is None:
            if self.vocab_size < _FEWEST_PIECES:
                raise ValueError(
                    f"vocab_size={self.vocab_size} is less than the {_FEWEST_PIECES} ids of a tokenizer that "
                    "is trained here; raise it"
                )
            for name in ("bos", "eos", "pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r} is of a given model; set it to null")
        return self


class DataConfig(Config):
    """A prepared dataset: where it is, what goes in, and how training cuts it into windows."""

    directory: str = Field(min_length=1)
    sequence_length: int = Field(ge=SHORTEST_ROW)
    corpora: dict[str, CorpusConfig] = Field(min_length=1)
    tokenizer: TokenizerConfig
    held_out: float = Field(ge=0, lt=0.5)
    workers: int = Field(ge=0, le=1024)
    max_bad_documents: int = Field(ge=0)
    verify: bool

    @field_validator("corpora")
    @classmethod
    def _corpora_name_files(cls, value: dict[str, CorpusConfig]) -> dict[str, CorpusConfig]:
        for name in value:
            if not _CORPUS_NAME.fullmatch(name):
                raise ValueError(f"corpus {name!r} names a file: use letters, digits, _ and -, at most 64")
            if name == HELD_OUT:
                raise ValueError(f"the name {HELD_OUT!r} is taken by the held-out split; choose another")
        return value

    @model_validator(mode="before")
    @classmethod
    def _a_blend_is_several_corpora(cls, value: Any) -> Any:
        corpora = value.get("corpora") if isinstance(value, dict) else None
        if not isinstance(corpora, dict):
            return value
        found = dict[str, Any]()
        for name, corpus in corpora.items():
            parts = _blend(corpus) if isinstance(corpus, dict) else None
            found |= (
                {name: corpus} if parts is None else {f"{name}_{n}": part for n, part in enumerate(parts)}
            )
        return {**value, "corpora": found}

    @model_validator(mode="after")
    def _token_files_have_a_tokenizer(self) -> "DataConfig":
        if self.tokenizer.model is None:
            for name, corpus in self.corpora.items():
                if corpus.kind == MEGATRON:
                    raise ValueError(
                        f"tokenizer.model is missing: name the tokenizer that wrote the tokens of {name}"
                    )
        return self

    @model_validator(mode="after")
    def _weights_are_of_one_kind(self) -> "DataConfig":
        by_epochs = {name for name, corpus in self.corpora.items() if corpus.epochs is not None}
        if by_epochs and (others := sorted(self.corpora.keys() - by_epochs)):
            raise ValueError(
                f"corpora.{others[0]}.epochs is missing, and {sorted(by_epochs)[0]} has it; give all corpora "
                "epochs, or all weights"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Mixture weight of each corpus, as given; they need not sum to one."""
        return {name: corpus.weight for name, corpus in self.corpora.items()}

    @property
    def epochs(self) -> dict[str, float] | None:
        """How often each corpus is read for one reading of one with 1; None where weights say it."""
        found = {name: corpus.epochs for name, corpus in self.corpora.items() if corpus.epochs is not None}
        return found or None
