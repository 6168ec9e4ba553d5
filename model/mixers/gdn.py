"""Gated DeltaNet: linear attention that forgets by a gate and overwrites by key (Qwen3-Next's form).

Without decay and output gate it is DeltaNet, arXiv 2406.06484.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import softplus

from kernels.convolution import short_convolution
from kernels.norm import unit_norm
from model.linear import GatedRMSNorm, Initial, Linear, RMSNorm
from model.mixer import Context, Flops, Mixer, MixerConfig, Sequence, TPShard
from model.recurrence import DeltaRule


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
        """Convolution in and out, output, gate, normed output, and the triangular solve of each chunk."""
        values, gate = self._parts()[2:4]
        return element_bytes * (2 * self._mixed() + 2 * values + gate) + self.num_value_heads * (8 + 2 * 64)

    def cut_activation_bytes(self, *, element_bytes: int = 2) -> int:
        """What each token reads of the state that enters its chunk."""
        return self.num_value_heads * self.key_dim * element_bytes

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Key heads are the unit; the value heads of a group go with their key head."""
        tp_plan = {
            "in_proj.weight": TPShard(0, "key_heads", self._parts()),
            "conv.weight": TPShard(0, "key_heads", self._parts()[:3]),
            "out_norm.weight": TPShard(None),
            "out_proj.weight": TPShard(1, "key_heads"),
        }
        decay = {"decay.A_log": TPShard(0, "key_heads"), "decay.dt_bias": TPShard(0, "key_heads")}
        return tp_plan | decay if self.has_decay else tp_plan

    @property
    def context(self) -> Context:
        """Chunk summaries of the state are passed on; the convolution reads a few tokens to the left."""
        return Context("state", self.conv_width - 1)


class Decay(nn.Module):
    """Log decay per head, -exp(A_log) softplus(x + dt_bias), in float32 at least."""

    # In bfloat16 a rate near 1 would round the memory length by percents.
    needs_full_precision = True
    fusible = ("forward",)

    def __init__(self, heads: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        # Rates of 1 to 16 and steps of dt_min to dt_max spread the memory over 1 to 1000 tokens.
        self.initial = {
            "A_log": Initial("log_of_uniform", 1.0, 16.0),
            "dt_bias": Initial("inverse_softplus_of_log_uniform", dt_min, dt_max),
        }

    def forward(self, x: Float[Tensor, "B T H"]) -> Float[Tensor, "B T H"]:
        """At most zero."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = self.A_log.to(dtype).exp()
        return -rate * softplus(x.to(dtype) + self.dt_bias.to(dtype))


class ConvWeight(nn.Module):
    """Taps of a depthwise convolution over channels, and its bias if there is one."""

    def __init__(self, channels: int, taps: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if has_bias else None
        uniform = Initial("uniform", -(taps**-0.5), taps**-0.5)
        self.initial = {"weight": uniform, "bias": uniform} if has_bias else {"weight": uniform}

    def forward(
        self, x: Float[Tensor, "B T D"], sequence: Sequence, *, has_silu: bool = True
    ) -> Float[Tensor, "B T D"]:
        """The convolution, document by document, through SiLU or not."""
        sharding, bias = sequence.sharding, None if self.bias is None else self.bias.to(x.dtype)
        document = None if sequence.document is None else sharding.chunks(sequence.document)
        out = short_convolution(
            sharding.chunks(x),
            self.weight.to(x.dtype),
            bias,
            document=document,
            initial_state=self._tail(x, sequence),
            has_silu=has_silu,
        )
        return sharding.restore(out)

    def _tail(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "X U D"] | None:
        # The tokens before each chunk, zero where they are of another document than the chunk's first one.
        count = self.weight.shape[1] - 1
        tail = sequence.sharding.before(x, count) if count else None
        if tail is None:
            return None
        first = sequence.sharding.chunks(sequence.position)[:, :1]
        distance = torch.arange(count, 0, -1, device=x.device)
        return tail * (distance <= first)[..., None]


def delta_inputs(
    mixed: Float[Tensor, "B T X"],
    beta: Float[Tensor, "B T H"],
    parts: tuple[int, ...],
    key_dim: int,
    value_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys [B T G K] of unit length, values [B T H V], and betas between 0 and 1."""
    q, k, v = mixed.split(parts, dim=-1)
    q, k = (part.unflatten(-1, (-1, key_dim)) for part in (q, k))
    return unit_norm(q, factor=key_dim**-0.5), unit_norm(k), v.unflatten(-1, (-1, value_dim)), beta.sigmoid()


class Gdn(Mixer):
    """Gated DeltaNet; one projection makes queries, keys, values, output gates, betas and decay inputs."""

    fusible = ("_prepare", "_close")

    def __init__(self, config: GdnConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.conv = ConvWeight(config._mixed(), config.conv_width)
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
        return delta_inputs(mixed, beta, self.parts[:3], self.config.key_dim, self.config.value_dim)

    def _close(self, out: Float[Tensor, "B T H V"], gate: Float[Tensor, "B T X"]) -> Float[Tensor, "B T D"]:
        """The normed and gated output of all heads, projected."""
        gates = (gate.view(out.shape),) if self.config.has_output_gate else ()
        return self.out_proj(self.out_norm(out, *gates).flatten(-2))
