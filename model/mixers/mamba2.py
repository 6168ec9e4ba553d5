"""Mamba-2: a linear state space whose step depends on the token (Nemotron-H's form).

Letters: a head has V channels, each with a state of K numbers; G groups of heads share keys and queries.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from kernels.norm import gated_rms_norm
from model.linear import Initial, Linear
from model.mixer import Flops, Mixer, MixerConfig, Sequence, TPShard
from model.recurrence import LinearAttention
from model.short_convolution import ShortConvolution
from model.tensor_shards import ALL_HEADS, HeadShards


class Mamba2Config(MixerConfig):
    """Fields of Mamba-2."""

    kind: Literal["mamba2"] = "mamba2"
    sharded_fields = ("num_heads",)
    replicable_fields = ("num_key_heads",)
    num_heads: int = Field(ge=1)
    num_key_heads: int = Field(ge=1)
    key_dim: int = Field(ge=1)
    value_dim: int = Field(ge=1)
    conv_width: int = Field(ge=1)
    has_conv_bias: bool
    norm_eps: float = Field(gt=0, lt=1)
    dt_floor: float = Field(ge=0)
    dt_min: float = Field(gt=0)
    dt_max: float = Field(gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "Mamba2Config":
        heads, key_heads = self.num_heads, self.num_key_heads
        if heads % key_heads:
            raise ValueError(f"num_heads {heads} must be a multiple of num_key_heads {key_heads}")
        if self.dt_min >= self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} must be below dt_max {self.dt_max}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Mamba2":
        """The module; all layers are alike."""
        return Mamba2(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _parts(self) -> tuple[int, int, int, int, int]:
        values, keys = self.num_heads * self.value_dim, self.num_key_heads * self.key_dim
        return values, values, keys, keys, self.num_heads

    def _mixed(self) -> int:
        return sum(self._parts()[1:4])

    def count_params(self, width: int) -> int:
        """Projections, convolution taps and biases, rates, step biases and skips, output norm."""
        values = self._parts()[0]
        taps = self._mixed() * (self.conv_width + self.has_conv_bias)
        return width * (sum(self._parts()) + values) + taps + 3 * self.num_heads + values

    def flops(self, width: int, context: int) -> Flops:
        """The recurrence: decay, write, read; independent of the context."""
        core = 5 * self.num_heads * self.key_dim * self.value_dim
        projections = 2 * width * (sum(self._parts()) + self._parts()[0])
        return Flops(projections, core + 2 * self.conv_width * self._mixed())

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """The state in float32, and the tail of the convolution."""
        state = 4 * self.num_heads * self.key_dim * self.value_dim
        return state + (self.conv_width - 1) * self._mixed() * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, convolution, values times steps, output before and after its norm, one matrix of each
        chunk of 64 tokens, and steps and decays in float32.
        """
        kept = sum(self._parts()) + self._mixed() + 3 * self._parts()[0] + 64 * self.num_heads
        return element_bytes * kept + 24 * self.num_heads + 4 * self.num_key_heads

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; a key head is shared by its group of heads, whose norm is one."""
        split = TPShard(0)
        mixed = TPShard(0, self._parts()[1:4])
        tp_plan = {
            "in_proj.weight": TPShard(0, self._parts()),
            "conv.weight": mixed,
            "step.A_log": split,
            "step.dt_bias": split,
            "skip": split,
            "out_norm.weight": split,
            "out_proj.weight": TPShard(1),
        }
        return tp_plan | ({"conv.bias": mixed} if self.has_conv_bias else {})

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Chunk summaries of the state are passed on; the convolution reads a few tokens to the left."""
        return "state"


class Step(nn.Module):
    """Step of each head, max(floor, softplus(x + dt_bias)), and its log decay, -exp(A_log) times the step."""

    # In bfloat16 a rate near 1 would round the memory length by percents.
    needs_full_precision = True
    fusible = ("forward",)

    def __init__(self, heads: int, floor: float, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.floor = floor
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.initial = {
            "A_log": Initial("log_of_uniform", 1.0, 16.0, is_float32=True),
            "dt_bias": Initial("inverse_softplus_of_log_uniform", dt_min, dt_max, is_float32=True),
        }

    def forward(self, x: Float[Tensor, "B T H"]) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
        """Steps above zero, and log decays of at most zero, in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        step = softplus(x.to(dtype) + self.dt_bias.to(dtype)).clamp(min=self.floor)
        return step, -self.A_log.to(dtype).exp() * step


class GatedGroupNorm(nn.Module):
    """Norm of x times SiLU of a gate, with one scale per group of channels."""

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.initial = {"weight": Initial("constant", 1.0)}

    def forward(
        self, x: Float[Tensor, "B T X"], gate: Float[Tensor, "B T X"], head_shards: HeadShards = ALL_HEADS
    ) -> Float[Tensor, "B T X"]:
        """Computed in float32 at least; the result has the dtype of the gate.

        Where ranks share a group the scale is that of all its channels.
        """
        if head_shards.kv_replicas > 1:
            return self._shared(x, gate, head_shards)
        x, gate = (part.unflatten(-1, (self.groups, -1)) for part in (x, gate))
        weight = self.weight.view(self.groups, -1)
        return gated_rms_norm(x, gate, weight, self.eps, kind="silu", gates_first=True).flatten(-2)

    def _shared(
        self, x: Float[Tensor, "B T X"], gate: Float[Tensor, "B T X"], head_shards: HeadShards
    ) -> Float[Tensor, "B T X"]:
        # All channels here are of one group.
        dtype = torch.promote_types(gate.dtype, torch.float32)
        wide = x.to(dtype) * silu(gate.to(dtype))
        mean = head_shards.sum_kv_replicas(wide.square().sum(-1, keepdim=True)) / (
            wide.shape[-1] * head_shards.kv_replicas
        )
        return (wide * (mean + self.eps).rsqrt() * self.weight.to(dtype)).to(gate.dtype)


class Mamba2(Mixer):
    """Mamba-2; one projection makes gates, values, keys, queries and steps."""

    def __init__(self, config: Mamba2Config, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        values = self.parts[0]
        self.in_proj = Linear(width, sum(self.parts), init_std)
        self.conv = ShortConvolution(config._mixed(), config.conv_width, has_bias=config.has_conv_bias)
        self.step = Step(config.num_heads, config.dt_floor, config.dt_min, config.dt_max)
        self.skip = nn.Parameter(torch.empty(config.num_heads))
        self.initial = {"skip": Initial("constant", 1.0, is_float32=True)}
        self.out_norm = GatedGroupNorm(config.num_key_heads, values, config.norm_eps)
        self.out_proj = Linear(values, width, out_std)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """The state starts at zero in every document."""
        config = self.config
        gate, mixed, step = self.in_proj(x).split([self.parts[0], config._mixed(), config.num_heads], dim=-1)
        v, k, q = self.conv(mixed, sequence).split(self.parts[1:4], dim=-1)
        k, q = (part.unflatten(-1, (-1, config.key_dim)) for part in (k, q))
        v = v.unflatten(-1, (-1, config.value_dim))
        step, log_decay = self.step(step)
        written = (v * step[..., None]).to(x.dtype)
        inputs = (q, k, written, log_decay)
        out = sequence.sharding.recur(LinearAttention(), inputs, sequence.position, sequence.document)
        out = out + v * self.skip.to(x.dtype)[:, None]
        return self.out_proj(self.out_norm(out.flatten(-2), gate, self.head_shards))
