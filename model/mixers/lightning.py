"""Linear attention with decay: MiniMax's lightning attention, RetNet, and gated linear attention."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from kernels.rotary import rotate
from model.linear import GatedRMSNorm, Initial, Linear, RMSNorm
from model.mixer import Flops, Mixer, MixerConfig, Sequence, TPShard
from model.recurrence import LinearAttention
from model.tensor_shards import ALL_HEADS


class LightningConfig(MixerConfig):
    """Fields of linear attention with decay."""

    kind: Literal["lightning"] = "lightning"
    sharded_fields = ("num_heads",)
    num_heads: int = Field(ge=1)
    key_dim: int = Field(ge=1)
    value_dim: int = Field(ge=1)
    decay: Literal["alibi_like", "retnet", "learned", "channel"]
    decay_rank: int = Field(ge=1)
    decay_temper: float = Field(gt=0)
    rotary_dim: int = Field(ge=0)
    rotary_theta: float = Field(gt=1)
    has_scale: bool
    has_silu: bool
    norm: Literal["all_heads", "per_head"]
    norm_eps: float = Field(gt=0, lt=1)
    output_gate: Literal["sigmoid", "silu", "none"]

    @model_validator(mode="after")
    def _fits(self) -> "LightningConfig":
        rotary, keys = self.rotary_dim, self.key_dim
        if rotary % 2 or rotary > keys:
            raise ValueError(f"rotary_dim {rotary} must be even and at most key_dim {keys}")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Lightning":
        """The module; with alibi_like decay the later the layer, the longer its memory."""
        return Lightning(self, width, layer, depth, init_std)

    def _parts(self) -> tuple[int, ...]:
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        gate = values * (self.output_gate != "none")
        return keys, keys, values, gate, self.num_heads * (self.decay == "learned")

    def _matrices(self, width: int) -> int:
        keys, _, values, *_ = self._parts()
        low_rank = (width + keys) * self.decay_rank * (self.decay == "channel")
        return width * (sum(self._parts()) + values) + low_rank

    def _decay_biases(self) -> int:
        return {"learned": self.num_heads, "channel": self._parts()[0]}.get(self.decay, 0)

    def _norm_dim(self) -> int:
        return self._parts()[2] if self.norm == "all_heads" else self.value_dim

    def count_params(self, width: int) -> int:
        """Projections, biases of data-dependent decays, output norm."""
        return self._matrices(width) + self._decay_biases() + self._norm_dim()

    def flops(self, width: int, context: int) -> Flops:
        """The recurrence: decay, write, read; independent of the context."""
        return Flops(2 * self._matrices(width), 5 * self.num_heads * self.key_dim * self.value_dim)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """The state in float32."""
        return 4 * self.num_heads * self.key_dim * self.value_dim

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, their parts after SiLU and rotary, output before and after its norm, one matrix of
        each chunk of 64 tokens, and decays in float32.
        """
        keys, _, values, *_ = self._parts()
        heads = self.num_heads
        kept = sum(self._parts()) + (2 * keys + values) * self.has_silu + 2 * keys * (self.rotary_dim > 0)
        # Unless rotary makes a copy of the queries, the scale does.
        kept += keys * (self.has_scale and self.rotary_dim == 0) + 2 * values + 64 * heads
        rows = 1 if self.norm == "all_heads" else heads
        sums = 8 * heads
        if self.decay == "channel":
            kept, sums = kept + self.decay_rank, 4 * keys // 64
        return element_bytes * kept + 4 * rows + sums + 12 * self._decay_biases()

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; the narrow half of a low-rank decay is copied."""
        tp_plan = {
            "in_proj.weight": TPShard(0, self._parts()),
            "out_norm.weight": TPShard(0) if self.norm == "all_heads" else TPShard(None),
            "out_proj.weight": TPShard(1),
        }
        if self.decay == "channel":
            tp_plan |= {"decay_down_proj.weight": TPShard(None), "decay_up_proj.weight": TPShard(0)}
        return tp_plan | ({"decay.bias": TPShard(0)} if self._decay_biases() else {})

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Chunk summaries of the state are passed on."""
        return "state"


def fixed_log_decay(
    kind: Literal["alibi_like", "retnet"], heads: int, layer: int, depth: int, like: Tensor
) -> Float[Tensor, "H"]:
    """Log decay of each head, in the dtype and on the device of `like`.

    alibi_like: -2^(-8 h / H) for h = 1 to H, times 1 in the first layer and down to 1e-5 in the last
    (MiniMax-01, arXiv 2501.08313). retnet: log(1 - 2^(-5 - h)) for h = 0 to H - 1 (arXiv 2307.08621).
    """
    head = torch.arange(heads, device=like.device, dtype=torch.float64)
    if kind == "retnet":
        return torch.log1p(-(2.0 ** (-5.0 - head))).to(like.dtype)
    # MTP modules stand behind the last layer and share its decay.
    layer_fraction = min(layer, depth - 1) / (depth - 1 + 1e-5)
    return -(2.0 ** (-8.0 * (head + 1.0) / heads) * (1.0 - layer_fraction + 1e-5)).to(like.dtype)


class GateDecay(nn.Module):
    """Log decay from data: log sigmoid(x + bias) over a temper, in float32 at least."""

    # In bfloat16 a factor near 1 would round the memory length by percents.
    needs_full_precision = True
    fusible = ("forward",)

    def __init__(self, size: int, temper: float) -> None:
        super().__init__()
        self.temper = temper
        self.bias = nn.Parameter(torch.empty(size))
        self.initial = {"bias": Initial("constant", 0.0, is_float32=True)}

    def forward(self, x: Float[Tensor, "B T X"]) -> Float[Tensor, "B T X"]:
        """At most zero. Gated linear attention, arXiv 2312.06635, section 4.4."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return logsigmoid(x.to(dtype) + self.bias.to(dtype)) / self.temper


class Lightning(Mixer):
    """Linear attention with decay; one projection makes queries, keys, values, gates and decays per head."""

    def __init__(self, config: LightningConfig, width: int, layer: int, depth: int, init_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        self.layer, self.depth = layer, depth
        self.in_proj = Linear(width, sum(self.parts), init_std)
        if config.decay == "channel":
            self.decay_down_proj = Linear(width, config.decay_rank, init_std)
            self.decay_up_proj = Linear(config.decay_rank, self.parts[0], init_std)
        if config._decay_biases():
            self.decay = GateDecay(config._decay_biases(), config.decay_temper)
        if config.output_gate == "none":
            self.out_norm = RMSNorm(config._norm_dim(), config.norm_eps, is_zero_centered=False)
        else:
            self.out_norm = GatedRMSNorm(config._norm_dim(), config.norm_eps, config.output_gate)
        self.out_proj = Linear(self.parts[2], width, init_std / (2 * depth) ** 0.5)

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """The state starts at zero in every document."""
        config = self.config
        mixed, gate, rate = self.in_proj(x).split([sum(self.parts[:3]), *self.parts[3:]], dim=-1)
        q, k, v = (silu(mixed) if config.has_silu else mixed).split(self.parts[:3], dim=-1)
        q, k = (part.unflatten(-1, (-1, config.key_dim)) for part in (q, k))
        v = v.unflatten(-1, (-1, config.value_dim))
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta)
            q, k = rotate(q, *table), rotate(k, *table)
        if config.has_scale:
            q = q * config.key_dim**-0.5
        inputs = (q, k, v, self._log_decay(x, rate))
        out = sequence.sharding.recur(LinearAttention(), inputs, sequence.position, sequence.document)
        out = out.flatten(-2) if config.norm == "all_heads" else out
        head_shards = self.head_shards if config.norm == "all_heads" else ALL_HEADS
        gates = () if config.output_gate == "none" else (gate.view(out.shape),)
        out = self.out_norm(out, *gates, head_shards=head_shards)
        return self.out_proj(out.reshape(*x.shape[:2], -1))

    def _log_decay(
        self, x: Float[Tensor, "B T D"], rate: Float[Tensor, "B T R"]
    ) -> Float[Tensor, "B T H"] | Float[Tensor, "B T H K"]:
        kind, heads = self.config.decay, self.config.num_heads
        if kind == "learned":
            return self.decay(rate)
        if kind == "channel":
            return self.decay(self.decay_up_proj(self.decay_down_proj(x))).unflatten(-1, (heads, -1))
        wide = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        decay = fixed_log_decay(kind, heads * self.head_shards.size, self.layer, self.depth, wide)
        return decay.view(-1, heads)[self.head_shards.rank].expand(*x.shape[:2], -1)
