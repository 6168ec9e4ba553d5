"""What the data floor is asked for: corpora, tokenizer, split, and where the prepared dataset lives."""

import re
from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator, model_validator

from conf.compose import Config

HELD_OUT = "held_out"  # the name of the held-out token file, so no corpus may have it
STDLIB = "stdlib"  # the source that stands for the running Python's own standard library

SHORTEST_ROW = 8  # tokens

_CORPUS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FILE_KINDS = ("code", "text")


class CorpusConfig(Config):
    """One named source of documents, and its share of the mixture."""

    kind: Literal["code", "text", "jsonl", "parquet", "hub"]
    source: str = Field(min_length=1)
    suffixes: Annotated[tuple[str, ...], Strict(False)] = ()
    field: str | None = None
    split: str | None = None
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "CorpusConfig":
        if self.kind in _FILE_KINDS:
            if self.field is not None:
                raise ValueError(f"field={self.field!r} is only for jsonl, parquet and hub; set field=null")
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
    """An existing sentencepiece model, or the size of one to train."""

    # 256 byte pieces, unknown, begin, end, every printable ASCII character, and room for merges.
    vocab_size: int = Field(ge=384, le=1_000_000)
    model: str | None = None
    train_bytes: int = Field(default=4_000_000, ge=1_000, le=2_000_000_000)


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

    @property
    def weights(self) -> dict[str, float]:
        """Mixture weight of each corpus, as given; they need not sum to one."""
        return {name: corpus.weight for name, corpus in self.corpora.items()}
