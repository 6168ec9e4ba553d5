"""Parameters, FLOPs, cache and activation bytes of a model, from its config alone."""

from typing import NamedTuple

from model.config import Architecture
from model.ffn import activation_bytes as ffn_activation_bytes
from model.ffn import count_params as count_ffn_params
from model.layout import DENSE, NONE, SHORTCUT, Layer
from model.mixer import Flops


class LayerCount(NamedTuple):
    """One layer, or one MTP module. `routed` and `active` are expert parameters, in all and
    per token. `norm_params` are those of the residual stream: norms, and what mixes several streams.
    """

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
    """The layers of a model and what surrounds them. Tied tables count once in all, as the head in FLOPs.

    mtp_modules count in `total`, never in `active`.
    """

    config: Architecture
    layers: tuple[LayerCount, ...]
    mtp_modules: tuple[LayerCount, ...]
    embedding: int
    head: int
    norm: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.main + sum(layer.params for layer in self.mtp_modules)

    @property
    def main(self) -> int:
        """All parameters but those of MTP modules."""
        return sum(layer.params for layer in self.layers) + self.embedding + self.head + self.norm

    @property
    def active(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        return self.main - sum(layer.routed - layer.active for layer in self.layers)

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
        head = 2.0 * shape.width * shape.vocab_size
        mtp = 0.0
        for layer in self.mtp_modules:
            mtp += head + 2 * (layer.ffn_params + layer.active + 2 * shape.width**2)
            if layer.mixer != NONE:
                flops = self.config.mixer[layer.mixer].flops(shape.width, context)
                mtp += flops.projections + flops.core
        return ModelFlops(mixers, ffn, head, mtp)

    def training_flops(self, context: int) -> float:
        """Useful operations per token of a training step: backward counts twice the forward."""
        flops = self.forward_flops(context)
        return 3 * (flops.total + flops.mtp)

    def cache_bytes(self, context: int) -> int:
        """Bytes that decoding keeps for one sequence of `context` tokens, bfloat16 with float32 states."""
        mixers = (layer.mixer for layer in self.layers if layer.mixer != NONE)
        return sum(self.config.mixer[name].cache_bytes(context) for name in mixers)


class ModelFlops(NamedTuple):
    """Forward operations per token: by mixer name over all its layers, feed-forward, head, and the MTP
    modules, which only training runs.
    """

    mixers: dict[str, Flops]
    ffn: float
    head: float
    mtp: float

    @property
    def total(self) -> float:
        """All that a forward pass does."""
        return sum(flops.projections + flops.core for flops in self.mixers.values()) + self.ffn + self.head


def count(config: Architecture) -> ModelCount:
    """The counts of a model, without building it."""
    shape = config.model
    table = shape.vocab_size * shape.width
    # Of each kind once: a deep model has few.
    kinds = {names: count_layer(config, names) for names in set(config.layers)}
    layers = tuple(kinds[names] for names in config.layers)
    head = 0 if shape.has_tied_embeddings else table
    mtp_modules = (count_prediction(config),) * shape.mtp.depth
    return ModelCount(
        config, layers, mtp_modules, table, head, config.residual.count_head_params(shape.width)
    )


def count_layer(config: Architecture, names: Layer) -> LayerCount:
    """The counts of one layer."""
    shape, (mixer, ffn) = config.model, names
    mixer_params = config.mixer[mixer].count_params(shape.width) if mixer != NONE else 0
    ffn_params = routed = active = 0
    if ffn in (DENSE, SHORTCUT):
        ffn_params += count_ffn_params(shape.width, shape.ffn_hidden, shape.activation)
    if ffn not in (DENSE, NONE):
        moe = config.moe.count_params(shape.width)
        ffn_params += moe.router + moe.shared
        routed, active = moe.routed, moe.active
    halves = (mixer != NONE) + (ffn != NONE)
    residual = halves * config.residual.count_params(shape.width)
    return LayerCount(mixer, ffn, mixer_params, ffn_params, routed, active, residual)


def count_prediction(config: Architecture) -> LayerCount:
    """The counts of one MTP module: a layer, a projection, and its norms."""
    settings, width = config.model.mtp, config.model.width
    layer = count_layer(config, Layer(settings.mixer, settings.ffn))
    around = 2 * width**2 + 2 * width + config.residual.count_head_params(width)
    return layer._replace(norm_params=layer.norm_params + around)


class HalfBytes(NamedTuple):
    """Bytes per token that a training step keeps for backward of each half of a layer, 0 where it is absent.

    stream is the residual stream as it enters each, which is part of both.
    """

    mixer: int
    ffn: int
    stream: int


def half_bytes(
    config: Architecture,
    names: Layer,
    *,
    element_bytes: int = 2,
    is_cut: bool = False,
    is_dispatched: bool = False,
) -> HalfBytes:
    """What the halves of a layer keep, nothing recomputed.

    is_cut: whether rows are cut over ranks. is_dispatched: whether experts are.
    """
    shape, (mixer, ffn) = config.model, names
    stream = config.residual.streams * shape.width * element_bytes
    around = config.residual.activation_bytes(shape.width, element_bytes=element_bytes)
    mixing = feeding = 0
    if mixer != NONE:
        entry = config.mixer[mixer]
        mixing = around + entry.activation_bytes(shape.width, element_bytes=element_bytes)
        mixing += entry.cut_activation_bytes(element_bytes=element_bytes) if is_cut else 0
    if ffn != NONE:
        feeding = around
    if ffn in (DENSE, SHORTCUT):
        feeding += ffn_activation_bytes(shape.ffn_hidden, shape.activation, element_bytes=element_bytes)
    if ffn not in (DENSE, NONE):
        feeding += config.moe.activation_bytes(
            shape.width, element_bytes=element_bytes, is_dispatched=is_dispatched
        )
    return HalfBytes(mixing, feeding, stream)


def activation_bytes(config: Architecture, layer: int, *, element_bytes: int = 2) -> int:
    """Bytes per token that a training step keeps of one layer for backward, nothing recomputed."""
    halves = half_bytes(config, config.layers[layer], element_bytes=element_bytes)
    return halves.mixer + halves.ffn
