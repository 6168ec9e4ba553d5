"""The part of the config tree that says what the model is."""

from typing import TYPE_CHECKING

from pydantic import model_validator

from conf.compose import Config
from conf.known_keys import did_you_mean
from model.layout import DENSE, MOE, NONE, Layer, LayoutConfig, expand_layers
from model.mixer import MixerConfig, mixer_entries_type
from model.moe.config import MoeConfig
from model.shape import ModelConfig, ResidualConfig

if TYPE_CHECKING:
    MixerEntries = dict[str, MixerConfig]
else:
    MixerEntries = mixer_entries_type()


class Architecture(Config):
    """Everything that a language model is built from."""

    model: ModelConfig
    layout: LayoutConfig
    mixer: MixerEntries
    moe: MoeConfig
    residual: ResidualConfig

    @model_validator(mode="after")
    def _fits(self) -> "Architecture":
        layers = expand_layers(self.layout, self.model.depth, self.mixer)
        self._check_selections(layers)
        mtp = self.model.mtp
        if mtp.depth:
            for key, name, known in (("mixer", mtp.mixer, self.mixer), ("ffn", mtp.ffn, (MOE, DENSE))):
                if name not in known:
                    hint = did_you_mean(name, known)
                    message = f"{name!r} is not one of {', '.join(sorted(known))}{hint}"
                    raise ValueError(f"model.mtp.{key}: {message}")
            if self.mixer[mtp.mixer].selection == "reads":
                message = "shares the keys that an earlier layer chose; an MTP module has none"
                raise ValueError(f"model.mtp.mixer: {mtp.mixer} {message}")
        return self

    def _check_selections(self, layers: tuple[Layer, ...]) -> None:
        has_choice = False
        for index, layer in enumerate(layers):
            selection = None if layer.mixer == NONE else self.mixer[layer.mixer].selection
            if selection == "reads" and not has_choice:
                makers = [name for name, config in self.mixer.items() if config.selection == "makes"]
                message = f"layer {index}, {layer.mixer}, shares the keys that an earlier layer chose"
                raise ValueError(f"layout: {message}; put one of {', '.join(makers)} before it")
            has_choice |= selection == "makes"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What stands at each depth."""
        return expand_layers(self.layout, self.model.depth, self.mixer)
