"""Kimi Delta Attention: the delta rule with a decay per key channel (Kimi-Linear's and GLM-5.3's forms)."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import softplus

from model.gated_delta import delta_rule_inputs
from model.linear import GatedRMSNorm, Initial, Linear
from model.mixer import Flops, Mixer, MixerConfig, Sequence, TPShard
from model.recurrence import DeltaRule
from model.short_convolution import ShortConvolution


class KdaConfig(MixerConfig):
    """Fields of Kimi Delta Attention."""

    kind: Literal["kda"] = "kda"
    sharded_fields = ("num_heads",)
    num_heads: int = Field(ge=1)
    key_dim: int = Field(ge=1)
    value_dim: int = Field(ge=1)
    conv_width: int = Field(ge=1)
    decay: Literal["softplus", "bounded_sigmoid"]
    decay_bound: float = Field(lt=0)
    decay_rank: int = Field(ge=1)
    gate_rank: int = Field(ge=1)
    norm_eps: float = Field(gt=0, lt=1)
    dt_min: float = Field(gt=0)
    dt_max: float = Field(gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "KdaConfig":
        if self.dt_min >= self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} must be below dt_max {self.dt_max}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Kda":
        """The module; all layers are alike."""
        return Kda(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _parts(self) -> tuple[int, int, int, int]:
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        return keys, keys, values, self.num_heads

    def _matrices(self, width: int) -> int:
        keys, _, values, _ = self._parts()
        low_rank = (width + keys) * self.decay_rank + (width + values) * self.gate_rank
        return width * (sum(self._parts()) + values) + low_rank

    def count_params(self, width: int) -> int:
        """Projections, convolution taps, decay rates and biases, output norm."""
        taps = sum(self._parts()[:3]) * self.conv_width
        return self._matrices(width) + taps + self.num_heads + self._parts()[0] + self.value_dim

    def flops(self, width: int, context: int) -> Flops:
        """The recurrence: decay, read by key, write, read by query; independent of the context."""
        core = 7 * self.num_heads * self.key_dim * self.value_dim
        return Flops(2 * self._matrices(width), core + 2 * self.conv_width * sum(self._parts()[:3]))

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """The state in float32, and the tail of the convolutions."""
        state = 4 * self.num_heads * self.key_dim * self.value_dim
        return state + (self.conv_width - 1) * sum(self._parts()[:3]) * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, convolution, unit keys and queries, betas, gate, output before and after its norm, two
        matrices of each chunk of 64 tokens, and decays three times in float32.
        """
        keys, _, values, heads = self._parts()
        kept = (
            sum(self._parts()) + sum(self._parts()[:3]) + 2 * keys + heads + self.decay_rank + self.gate_rank
        )
        kept += 3 * values + 2 * 64 * heads
        return element_bytes * kept + 12 * keys + 4 * keys // 64 + 12 * heads

    def cut_activation_bytes(self, *, element_bytes: int = 2) -> int:
        """What each token reads of the state that enters its chunk."""
        return self.num_heads * self.key_dim * element_bytes

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; the narrow halves of the low-rank projections are copied."""
        return {
            "in_proj.weight": TPShard(0, self._parts()),
            "decay_down_proj.weight": TPShard(None),
            "decay_up_proj.weight": TPShard(0),
            "gate_down_proj.weight": TPShard(None),
            "gate_up_proj.weight": TPShard(0),
            "conv.weight": TPShard(0, self._parts()[:3]),
            "decay.A_log": TPShard(0),
            "decay.dt_bias": TPShard(0),
            "out_norm.weight": TPShard(None),
            "out_proj.weight": TPShard(1),
        }

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Chunk summaries of the state are passed on; the convolutions read a few tokens to the left."""
        return "state"


class ChannelDecay(nn.Module):
    """Log decay per key channel, in float32 at least.

    softplus: -exp(A_log) softplus(x + dt_bias). bounded_sigmoid: bound sigmoid(exp(A_log) (x + dt_bias)).
    """

    # In bfloat16 a rate near 1 would round the memory length by percents.
    needs_full_precision = True
    fusible = ("forward",)

    def __init__(self, config: KdaConfig) -> None:
        super().__init__()
        self.bound = config.decay_bound if config.decay == "bounded_sigmoid" else None
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads * config.key_dim))
        kind, low, high = ("log_of_uniform", 1.0, 16.0) if self.bound is None else ("constant", 0.0, 0.0)
        steps = ("inverse_softplus_of_log_uniform", config.dt_min, config.dt_max)
        self.initial = {
            "A_log": Initial(kind, low, high, is_float32=True),
            "dt_bias": Initial(*steps, is_float32=True),
        }

    def forward(self, x: Float[Tensor, "B T HK"]) -> Float[Tensor, "B T H K"]:
        """At most zero."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = self.A_log.to(dtype).exp()[:, None]
        x = (x.to(dtype) + self.dt_bias.to(dtype)).unflatten(-1, (len(rate), -1))
        return -rate * softplus(x) if self.bound is None else self.bound * (rate * x).sigmoid()


class Kda(Mixer):
    """Kimi Delta Attention; one projection makes queries, keys, values and betas, narrow ones the gates."""

    fusible = ("_prepare", "_close")

    def __init__(self, config: KdaConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        keys, _, values, _ = self.parts
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.decay_down_proj = Linear(width, config.decay_rank, init_std)
        self.decay_up_proj = Linear(config.decay_rank, keys, init_std)
        self.gate_down_proj = Linear(width, config.gate_rank, init_std)
        self.gate_up_proj = Linear(config.gate_rank, values, init_std)
        self.conv = ShortConvolution(sum(self.parts[:3]), config.conv_width)
        self.decay = ChannelDecay(config)
        self.out_norm = GatedRMSNorm(config.value_dim, config.norm_eps, "sigmoid")
        self.out_proj = Linear(values, width, out_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """The state starts at zero in every document."""
        mixed, beta = self.in_proj(x).split([sum(self.parts[:3]), self.parts[3]], dim=-1)
        q, k, v, beta = self._prepare(self.conv(mixed, sequence), beta)
        log_decay = self.decay(self.decay_up_proj(self.decay_down_proj(x)))
        inputs = (q, k, v, log_decay, beta)
        out = sequence.sharding.recur(DeltaRule(), inputs, sequence.position, sequence.document)
        return self._close(out, x)

    def _prepare(self, mixed: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return delta_rule_inputs(mixed, beta, self.parts[:3], self.config.key_dim, self.config.value_dim)

    def _close(self, out: Float[Tensor, "B T H V"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The normed output of all heads, gated by x and projected."""
        gate = self.gate_up_proj(self.gate_down_proj(x))
        return self.out_proj(self.out_norm(out, gate.view(out.shape)).flatten(-2))
