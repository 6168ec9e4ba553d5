"""Sizes, activations and residual stream: the part of the model's config that names no mixer."""

from typing import Literal

from pydantic import Field, model_validator

from conf.compose import Config


class ActivationConfig(Config):
    """What stands between the two projections of a feed-forward; fields as `kernels.activation` has them."""

    kind: Literal["swiglu", "geglu", "shifted_swiglu", "relu2"]
    limit: float | None = Field(gt=0)
    clamps_product: bool
    limit_from: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "ActivationConfig":
        if self.limit is not None and not self.is_gated:
            raise ValueError(f"kind {self.kind} takes no limit; set limit=null")
        return self

    @property
    def is_gated(self) -> bool:
        """Whether the first projection makes gates beside ups."""
        return self.kind != "relu2"

    @property
    def factors(self) -> int:
        """Columns of the first projection per hidden dim."""
        return 2 if self.is_gated else 1

    def limit_at(self, layer: int) -> float | None:
        """The limit in that layer."""
        return self.limit if layer >= self.limit_from else None


class MTPConfig(Config):
    """Multi-token prediction: modules behind the last layer that predict further tokens."""

    depth: int = Field(ge=0)
    coefficient: float = Field(ge=0)
    mixer: str
    ffn: str
    puts_hidden_first: bool


class ModelConfig(Config):
    """Sizes that all layers share."""

    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    vocab_size: int = Field(ge=2)
    ffn_hidden: int = Field(ge=1)
    activation: ActivationConfig
    has_tied_embeddings: bool
    embedding_scale: float = Field(gt=0)
    logit_cap: float | None = Field(gt=0)
    z_loss: float = Field(ge=0)
    init_std: float = Field(gt=0)
    mtp: MTPConfig


class ResidualConfig(Config):
    """How blocks read from the residual stream and write to it."""

    kind: Literal["pre_norm", "sandwich", "scaled_post_norm", "hyper"]
    norm: Literal["rms", "layer"]
    norm_eps: float = Field(gt=0, lt=1)
    has_zero_centered_norm: bool
    dropout: float = Field(ge=0, lt=1)
    alpha: float = Field(gt=0)
    beta: float = Field(gt=0)
    streams: int = Field(ge=1)
    iterations: int = Field(ge=1)
    hyper_eps: float = Field(gt=0, lt=1)
    has_learned_collapse: bool

    @model_validator(mode="after")
    def _fits(self) -> "ResidualConfig":
        if self.norm == "layer" and self.has_zero_centered_norm:
            raise ValueError("norm=layer has no zero-centred weights; set has_zero_centered_norm=false")
        if self.kind != "hyper" and self.streams != 1:
            raise ValueError(f"kind {self.kind} has one stream; found streams={self.streams}")
        return self

    @property
    def norms_per_half(self) -> int:
        """Norms of the model's width around a mixer, or around a feed-forward."""
        return 2 if self.kind == "sandwich" else 1

    def count_params(self, width: int) -> int:
        """Parameters of one half of a block beside its mixer or feed-forward."""
        hyper = self.streams * (self.streams + 2)
        connection = hyper * (self.streams * width + 1) + 3 if self.kind == "hyper" else 0
        return self.norms_per_half * width + connection

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Bytes per token that a training step keeps of one half beside its mixer or feed-forward.

        The stream as it enters is among them.
        """
        wide = max(4, element_bytes)
        kept = element_bytes * (self.streams + 1) * width
        kept += element_bytes * width * (self.kind == "sandwich")
        # A layer norm keeps a wide copy of its input instead of the input, and two numbers of each row.
        each = wide if self.norm == "rms" else 2 * wide + (wide - element_bytes) * width
        kept += each * self.norms_per_half
        if self.kind == "hyper":
            # The joined streams, the half's output, and the gates: as they come, activated, and narrowed.
            kept += 2 * element_bytes * width + element_bytes * self.streams * (1 + self.streams)
            kept += wide * (2 * self.streams * (self.streams + 2) + self.streams + 1)
        return kept + width * (self.dropout > 0)

    def count_head_params(self, width: int) -> int:
        """Parameters between the last block and the head: the last norm, and what joins the streams."""
        joins = self.kind == "hyper" and self.has_learned_collapse
        return width + joins * (self.streams * (self.streams * width + 1) + 1)
