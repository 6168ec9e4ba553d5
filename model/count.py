"""Parameters, FLOPs, cache and activation bytes of a model, from its config alone."""

from typing import NamedTuple

from model.config import Architecture
from model.ffn import activation_bytes as ffn_activation_bytes
from model.ffn import count_params as count_ffn_params
from model.layout import NONE
from model.mixer import Flops


class LayerCount(NamedTuple):
    """One layer. `routed` and `active` are expert parameters in all and per token."""

    mixer: str
    ffn: str
    mixer_params: int
    ffn_params: int
    routed: int
    active: int
    norm_params: int

    @property
    def params(self) -> int:
        """All parameters of the layer."""
        return self.mixer_params + self.ffn_params + self.routed + self.norm_params

    @property
    def active_params(self) -> int:
        """Parameters that one token uses."""
        return self.params - self.routed + self.active


class ModelCount(NamedTuple):
    """The layers of a model and what surrounds them. Tied tables count once in all, as the head in FLOPs."""

    config: Architecture
    layers: tuple[LayerCount, ...]
    embedding: int
    head: int
    norm: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(layer.params for layer in self.layers) + self.embedding + self.head + self.norm

    @property
    def active(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        unused = sum(layer.routed - layer.active for layer in self.layers)
        return self.total - unused

    def forward_flops(self, context: int) -> "ModelFlops":
        """Useful forward operations per token, averaged over a sequence of `context` tokens."""
        shape = self.config.model
        mixers: dict[str, Flops] = {}
        ffn = 0.0
        for layer in self.layers:
            if layer.mixer != NONE:
                flops = self.config.mixer[layer.mixer].flops(shape.width, context)
                before = mixers.get(layer.mixer, Flops(0.0, 0.0))
                mixers[layer.mixer] = Flops(before.projections + flops.projections, before.core + flops.core)
            ffn += 2 * (layer.ffn_params + layer.active)
        return ModelFlops(mixers, ffn, 2.0 * shape.width * shape.vocab_size)

    def training_flops(self, context: int) -> float:
        """Useful operations per token of a training step: backward counts twice the forward."""
        return 3 * self.forward_flops(context).total

    def cache_bytes(self, context: int) -> int:
        """Bytes that decoding keeps for one sequence of `context` tokens, bfloat16 with float32 states."""
        mixers = (layer.mixer for layer in self.layers if layer.mixer != NONE)
        return sum(self.config.mixer[name].cache_bytes(context) for name in mixers)


class ModelFlops(NamedTuple):
    """Forward operations per token: by mixer name over all its layers, feed-forward, head."""

    mixers: dict[str, Flops]
    ffn: float
    head: float

    @property
    def total(self) -> float:
        """All together."""
        return sum(flops.projections + flops.core for flops in self.mixers.values()) + self.ffn + self.head


def count(config: Architecture) -> ModelCount:
    """The counts of a model, without building it."""
    shape = config.model
    table = shape.vocab_size * shape.width
    layers = tuple(count_layer(config, layer) for layer in range(shape.depth))
    return ModelCount(config, layers, table, 0 if shape.has_tied_embeddings else table, shape.width)


def count_layer(config: Architecture, layer: int) -> LayerCount:
    """The counts of one layer."""
    width, (mixer, ffn) = config.model.width, config.layers[layer]
    mixer_params = config.mixer[mixer].count_params(width) if mixer != NONE else 0
    ffn_params = routed = active = 0
    if ffn == "moe":
        moe = config.moe.count_params(width)
        ffn_params, routed, active = moe.router + moe.shared, moe.routed, moe.active
    elif ffn == "dense":
        ffn_params = count_ffn_params(width, config.model.ffn_hidden)
    norms = width * ((mixer != NONE) + (ffn != NONE))
    return LayerCount(mixer, ffn, mixer_params, ffn_params, routed, active, norms)


def activation_bytes(config: Architecture, layer: int, *, element_bytes: int = 2) -> int:
    """Bytes per token that a training step keeps of one layer for backward, nothing recomputed."""
    width, (mixer, ffn) = config.model.width, config.layers[layer]
    total = 2 * width * element_bytes * ((mixer != NONE) + (ffn != NONE))
    if mixer != NONE:
        total += config.mixer[mixer].activation_bytes(width, element_bytes=element_bytes)
    if ffn == "moe":
        total += config.moe.activation_bytes(width, element_bytes=element_bytes)
    elif ffn == "dense":
        total += ffn_activation_bytes(config.model.ffn_hidden, element_bytes=element_bytes)
    return total
