"""Gated DeltaNet: linear attention that forgets by a gate and overwrites by key (Qwen3-Next's form).

Without decay and output gate it is DeltaNet, arXiv 2406.06484.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from model.gated_delta import Decay, delta_rule_inputs
from model.linear import GatedRMSNorm, Linear, RMSNorm
from model.mixer import Flops, Mixer, MixerConfig, Sequence, TPShard
from model.recurrence import DeltaRule
from model.short_convolution import ShortConvolution


class GdnConfig(MixerConfig):
    """Fields of Gated DeltaNet."""

    kind: Literal["gdn"] = "gdn"
    sharded_fields = ("num_value_heads",)
    replicable_fields = ("num_key_heads",)
    num_key_heads: int = Field(ge=1)
    num_value_heads: int = Field(ge=1)
    key_dim: int = Field(ge=1)
    value_dim: int = Field(ge=1)
    conv_width: int = Field(ge=1)
    has_decay: bool
    has_output_gate: bool
    norm_eps: float = Field(gt=0, lt=1)
    dt_min: float = Field(gt=0)
    dt_max: float = Field(gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "GdnConfig":
        heads, key_heads = self.num_value_heads, self.num_key_heads
        if heads % key_heads:
            raise ValueError(f"num_value_heads {heads} must be a multiple of num_key_heads {key_heads}")
        if self.dt_min >= self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} must be below dt_max {self.dt_max}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Gdn":
        """The module; all layers are alike."""
        return Gdn(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _parts(self) -> tuple[int, ...]:
        heads = self.num_value_heads
        keys, values = self.num_key_heads * self.key_dim, heads * self.value_dim
        return keys, keys, values, values * self.has_output_gate, heads, heads * self.has_decay

    def _mixed(self) -> int:
        return sum(self._parts()[:3])

    def count_params(self, width: int) -> int:
        """Projections, convolution taps, decay rates and biases, output norm."""
        values, heads = self._parts()[2], self.num_value_heads
        small = self._mixed() * self.conv_width + 2 * heads * self.has_decay + self.value_dim
        return width * (sum(self._parts()) + values) + small

    def flops(self, width: int, context: int) -> Flops:
        """The recurrence: decay, read by key, write, read by query; independent of the context."""
        core = (6 + self.has_decay) * self.num_value_heads * self.key_dim * self.value_dim
        conv = 2 * self.conv_width * self._mixed()
        return Flops(2 * width * (sum(self._parts()) + self._parts()[2]), core + conv)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """The state in float32, and the tail of the convolution."""
        state = 4 * self.num_value_heads * self.key_dim * self.value_dim
        return state + (self.conv_width - 1) * self._mixed() * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, convolution, unit keys and queries, betas, decays, output before and after its norm,
        and two matrices of each chunk of 64 tokens.
        """
        keys, _, values, *_ = self._parts()
        heads = self.num_value_heads
        kept = sum(self._parts()) + self._mixed() + 2 * keys + 2 * values + heads + 2 * 64 * heads
        rows = 2 * self.num_key_heads + heads
        return element_bytes * kept + 4 * rows + heads * (8 + (12 if self.has_decay else element_bytes))

    def cut_activation_bytes(self, *, element_bytes: int = 2) -> int:
        """What each token reads of the state that enters its chunk."""
        return self.num_value_heads * self.key_dim * element_bytes

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Key heads are the unit; the value heads of a group go with their key head."""
        tp_plan = {
            "in_proj.weight": TPShard(0, self._parts()),
            "conv.weight": TPShard(0, self._parts()[:3]),
            "out_norm.weight": TPShard(None),
            "out_proj.weight": TPShard(1),
        }
        decay = {"decay.A_log": TPShard(0), "decay.dt_bias": TPShard(0)}
        return tp_plan | decay if self.has_decay else tp_plan

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Chunk summaries of the state are passed on; the convolution reads a few tokens to the left."""
        return "state"


class Gdn(Mixer):
    """Gated DeltaNet; one projection makes queries, keys, values, output gates, betas and decay inputs."""

    fusible = ("_prepare", "_close")

    def __init__(self, config: GdnConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.conv = ShortConvolution(config._mixed(), config.conv_width)
        if config.has_decay:
            self.decay = Decay(config.num_value_heads, config.dt_min, config.dt_max)
        if config.has_output_gate:
            self.out_norm = GatedRMSNorm(config.value_dim, config.norm_eps, "silu")
        else:
            self.out_norm = RMSNorm(config.value_dim, config.norm_eps, is_zero_centered=False)
        self.out_proj = Linear(self.parts[2], width, out_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """The state starts at zero in every document."""
        config = self.config
        mixed, gate, beta, rate = self.in_proj(x).split([config._mixed(), *self.parts[3:]], dim=-1)
        q, k, v, beta = self._prepare(self.conv(mixed, sequence), beta)
        log_decay = self.decay(rate) if config.has_decay else torch.zeros_like(beta)
        inputs = (q, k, v, log_decay, beta)
        out = sequence.sharding.recur(DeltaRule(), inputs, sequence.position, sequence.document)
        return self._close(out, gate)

    def _prepare(self, mixed: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return delta_rule_inputs(mixed, beta, self.parts[:3], self.config.key_dim, self.config.value_dim)

    def _close(self, out: Float[Tensor, "B T H V"], gate: Float[Tensor, "B T X"]) -> Float[Tensor, "B T D"]:
        """The normed and gated output of all heads, projected."""
        gates = (gate.view(out.shape),) if self.config.has_output_gate else ()
        return self.out_proj(self.out_norm(out, *gates).flatten(-2))
