"""Mamba: a diagonal linear state space per channel whose step depends on the token (Jamba's form)."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from model.linear import Initial, Linear, RMSNorm
from model.mixer import Flops, Mixer, MixerConfig, Sequence, TPShard
from model.recurrence import SelectiveScan
from model.short_convolution import ShortConvolution


class MambaConfig(MixerConfig):
    """Fields of Mamba."""

    kind: Literal["mamba"] = "mamba"
    sharded_fields = ("num_channels",)
    num_channels: int = Field(ge=1)
    state_dim: int = Field(ge=1)
    dt_rank: int = Field(ge=1)
    conv_width: int = Field(ge=1)
    has_conv_bias: bool
    has_inner_norm: bool
    norm_eps: float = Field(gt=0, lt=1)
    dt_min: float = Field(gt=0)
    dt_max: float = Field(gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "MambaConfig":
        if self.dt_min >= self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} must be below dt_max {self.dt_max}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Mamba":
        """The module; all layers are alike."""
        return Mamba(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _inner(self) -> tuple[int, int, int]:
        return self.dt_rank, self.state_dim, self.state_dim

    def _matrices(self, width: int) -> int:
        return self.num_channels * (3 * width + sum(self._inner()) + self.dt_rank)

    def count_params(self, width: int) -> int:
        """Projections, convolution taps and biases, rates, step biases and skips, inner norms."""
        per_channel = self.conv_width + self.has_conv_bias + self.state_dim + 2
        norms = sum(self._inner()) * self.has_inner_norm
        return self._matrices(width) + self.num_channels * per_channel + norms

    def flops(self, width: int, context: int) -> Flops:
        """The recurrence: factor, decay, write, read; independent of the context."""
        core = self.num_channels * (7 * self.state_dim + 2 * self.conv_width)
        return Flops(2 * self._matrices(width), core)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """The state in float32, and the tail of the convolution."""
        return self.num_channels * (4 * self.state_dim + (self.conv_width - 1) * element_bytes)

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, convolution, output, gate, gated output, and in float32 what the scan reads.

        The scan also keeps the state that enters each chunk of 16 tokens.
        """
        kept = 6 * self.num_channels + sum(self._inner()) + self.dt_rank * self.has_inner_norm
        scan = 3 * self.num_channels + 2 * self.state_dim + self.num_channels * self.state_dim // 16
        return element_bytes * kept + 4 * (scan + 3 * self.has_inner_norm)

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Channels are the unit; what all channels share, between them, is summed and copied."""
        split = TPShard(0)
        tp_plan = {
            "in_proj.weight": TPShard(0, (self.num_channels, self.num_channels)),
            "conv.weight": split,
            "x_proj.weight": TPShard(1),
            "dt_proj.weight": split,
            "step.A_log": split,
            "step.dt_bias": split,
            "skip": split,
            "out_proj.weight": TPShard(1),
        }
        if self.has_inner_norm:
            tp_plan |= {f"{name}_norm.weight": TPShard(None) for name in ("dt", "k", "q")}
        return tp_plan | ({"conv.bias": split} if self.has_conv_bias else {})

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Chunk summaries of the state are passed on; the convolution reads a few tokens to the left."""
        return "state"


class LogOfIndex(Initial):
    """log 1, log 2, ... along the last dim: rates that spread the memory of a channel (S4D-real)."""

    def sample(self, shape: torch.Size, generator: torch.Generator) -> Float[Tensor, "..."]:
        """Values in float32 on the generator's device; nothing is random."""
        return torch.arange(1, shape[-1] + 1, device=generator.device).float().log().expand(shape)


class ChannelStep(nn.Module):
    """Step of each channel, softplus(x + dt_bias), and the rates of its states, exp(A_log)."""

    # In bfloat16 a rate near 1 would round the memory length by percents.
    needs_full_precision = True
    fusible = ("forward",)

    def __init__(self, channels: int, state_dim: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, state_dim))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.initial = {
            "A_log": LogOfIndex("log_of_index", 0.0, is_float32=True),
            "dt_bias": Initial("inverse_softplus_of_log_uniform", dt_min, dt_max, is_float32=True),
        }

    def forward(self, x: Float[Tensor, "B T X"]) -> tuple[Float[Tensor, "B T X"], Float[Tensor, "X K"]]:
        """Both above zero, in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return softplus(x.to(dtype) + self.dt_bias.to(dtype)), self.A_log.to(dtype).exp()


class Mamba(Mixer):
    """Mamba; steps, keys and queries come from the convolved channels."""

    def __init__(self, config: MambaConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config = config
        channels, rank, states = config.num_channels, config.dt_rank, config.state_dim
        self.in_proj = Linear(width, 2 * channels, init_std)
        self.conv = ShortConvolution(channels, config.conv_width, has_bias=config.has_conv_bias)
        self.x_proj = Linear(channels, sum(config._inner()), init_std)
        if config.has_inner_norm:
            self.dt_norm = RMSNorm(rank, config.norm_eps, is_zero_centered=False)
            self.k_norm = RMSNorm(states, config.norm_eps, is_zero_centered=False)
            self.q_norm = RMSNorm(states, config.norm_eps, is_zero_centered=False)
        self.dt_proj = Linear(rank, channels, rank**-0.5)
        self.step = ChannelStep(channels, states, config.dt_min, config.dt_max)
        self.skip = nn.Parameter(torch.empty(channels))
        self.initial = {"skip": Initial("constant", 1.0, is_float32=True)}
        self.out_proj = Linear(channels, width, out_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """The state starts at zero in every document."""
        config = self.config
        mixed, gate = self.in_proj(x).chunk(2, dim=-1)
        mixed = self.conv(mixed, sequence)
        dt, k, q = self.head_shards.sum(self.x_proj(mixed)).split(config._inner(), dim=-1)
        if config.has_inner_norm:
            dt, k, q = self.dt_norm(dt), self.k_norm(k), self.q_norm(q)
        step, rate = self.step(self.dt_proj(dt))
        inputs = (mixed, step, k, q)
        out = sequence.sharding.recur(SelectiveScan(rate), inputs, sequence.position, sequence.document)
        out = out + mixed * self.skip.to(x.dtype)
        return self.out_proj(out * silu(gate))
