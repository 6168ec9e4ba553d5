"""Gated short convolution: a gate in, a causal convolution of a few taps, a gate out (LFM2)."""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from model.linear import Linear
from model.mixer import Flops, Mixer, MixerConfig, Sequence, TPShard
from model.short_convolution import ShortConvolution


class ConvConfig(MixerConfig):
    """Fields of the gated short convolution."""

    kind: Literal["conv"] = "conv"
    sharded_fields = ("num_channels",)
    num_channels: int = Field(ge=1)
    conv_width: int = Field(ge=2)

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Conv":
        """The module; all layers are alike."""
        return Conv(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def count_params(self, width: int) -> int:
        """Projections and taps."""
        return self.num_channels * (4 * width + self.conv_width)

    def flops(self, width: int, context: int) -> Flops:
        """Taps and two gates per channel, independent of the context."""
        return Flops(8 * width * self.num_channels, (2 * self.conv_width + 2) * self.num_channels)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """The tail of the convolution."""
        return (self.conv_width - 1) * self.num_channels * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Both gates, the input, its product with the first gate, the convolution, its gated output."""
        return 6 * self.num_channels * element_bytes

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Channels are the unit: none meets another between the projections."""
        return {
            "in_proj.weight": TPShard(0, (self.num_channels,) * 3),
            "conv.weight": TPShard(0),
            "out_proj.weight": TPShard(1),
        }

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """No state but the tokens that the taps read to the left."""
        return "state"


class Conv(Mixer):
    """out_proj(gate_out * conv(gate_in * x)); one projection makes both gates and x."""

    def __init__(self, config: ConvConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        channels = config.num_channels
        self.in_proj = Linear(width, 3 * channels, init_std)
        self.conv = ShortConvolution(channels, config.conv_width)
        self.out_proj = Linear(channels, width, out_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """Taps stop at document starts."""
        gate_in, gate_out, inner = self.in_proj(x).chunk(3, dim=-1)
        mixed = self.conv(gate_in * inner, sequence, has_silu=False)
        return self.out_proj(gate_out * mixed)
