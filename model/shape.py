"""Sizes and residual stream: the part of the model's config that names no mixer."""

from typing import Literal

from pydantic import Field

from conf.compose import Config


class ModelConfig(Config):
    """Sizes that all layers share."""

    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    vocab_size: int = Field(ge=2)
    ffn_hidden: int = Field(ge=1)
    has_tied_embeddings: bool
    init_std: float = Field(gt=0)


class ResidualConfig(Config):
    """How blocks read from the residual stream and write to it."""

    kind: Literal["pre_norm"]
    norm_eps: float = Field(gt=0, lt=1)
    has_zero_centered_norm: bool
    dropout: float = Field(ge=0, lt=1)
