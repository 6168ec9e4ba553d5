"""The part of the config tree that says what the model is."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from conf.compose import Config
from model.layout import Layer, LayoutConfig, expand_layers
from model.mixer import MixerConfig, mixer_entries_type
from model.moe.config import MoeConfig

if TYPE_CHECKING:
    MixerEntries = dict[str, MixerConfig]
else:
    MixerEntries = mixer_entries_type()


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


class Architecture(Config):
    """Everything that a language model is built from."""

    model: ModelConfig
    layout: LayoutConfig
    mixer: MixerEntries
    moe: MoeConfig
    residual: ResidualConfig

    @model_validator(mode="after")
    def _fits(self) -> "Architecture":
        expand_layers(self.layout, self.model.depth, self.mixer)
        return self

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What stands at each depth."""
        return expand_layers(self.layout, self.model.depth, self.mixer)
