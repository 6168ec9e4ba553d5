"""Grouped-query softmax attention, with the windows, sinks, gates, norms and rotary of published models."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.attention import attention
from kernels.norm import rms_norm
from kernels.rotary import RotaryLayout, rotate
from model.grouped_query import GroupedQueryConfig
from model.linear import Initial, Linear, RMSNorm
from model.mixer import Flops, Mixer, Sequence, TPShard
from model.rotary import RotaryScaling


class AttnConfig(GroupedQueryConfig):
    """Fields of grouped-query softmax attention."""

    kind: Literal["attn"] = "attn"
    head_dim: int = Field(ge=2)
    value_dim: int = Field(ge=1)
    rotary_layout: RotaryLayout
    rotary_scaling: RotaryScaling
    window: int | None = Field(ge=1)
    chunk: int | None = Field(ge=1)
    scale: float | None = Field(gt=0)
    logit_cap: float | None = Field(gt=0)
    has_sinks: bool
    qk_norm: Literal["none", "head", "all_heads", "weightless"]
    norm_eps: float = Field(gt=0, lt=1)
    has_zero_centered_norm: bool
    output_gate: Literal["none", "channel", "head"]
    has_bias: bool
    has_output_bias: bool
    clip: float | None = Field(gt=0)
    value_scale: float = Field(gt=0)
    temperature: float = Field(ge=0)
    temperature_interval: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "AttnConfig":
        if self.window is not None and self.chunk is not None:
            raise ValueError(f"window {self.window} and chunk {self.chunk} exclude each other; null one")
        return self

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Attn":
        """The module; all layers are alike."""
        return Attn(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _parts(self) -> tuple[int, int, int, int]:
        heads, key_heads = self.num_heads, self.num_key_heads
        gates = {"none": 0, "channel": heads * self.value_dim, "head": heads}[self.output_gate]
        return heads * self.head_dim, gates, key_heads * self.head_dim, key_heads * self.value_dim

    def _normed(self) -> tuple[int, int]:
        # Widths of the weights of the two norms.
        if self.qk_norm == "head":
            return self.head_dim, self.head_dim
        return (self._parts()[0], self._parts()[2]) if self.qk_norm == "all_heads" else (0, 0)

    def _outputs(self) -> int:
        return self.num_heads * self.value_dim

    def _reach(self, context: int) -> int:
        # The most keys that a query sees.
        return min(self.window or self.chunk or context, context)

    def count_params(self, width: int) -> int:
        """Projections with their biases, norms and sinks."""
        biases = sum(self._parts()) * self.has_bias + width * self.has_output_bias
        small = sum(self._normed()) + self.num_heads * self.has_sinks
        return width * (sum(self._parts()) + self._outputs()) + biases + small

    def flops(self, width: int, context: int) -> Flops:
        """Scores and weighted values over the keys that a query sees on average."""
        reach = self._reach(context)
        if self.chunk is None:
            keys = reach - reach * (reach - 1) / (2 * context)
        else:
            rest = context % reach
            keys = (context // reach * reach * (reach + 1) + rest * (rest + 1)) / (2 * context)
        core = 2 * self.num_heads * (self.head_dim + self.value_dim) * keys
        return Flops(2 * width * (sum(self._parts()) + self._outputs()), core)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """Keys and values of the tokens that the next query sees beside its own."""
        return sum(self._parts()[2:]) * (self._reach(context + 1) - 1) * element_bytes

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Projections, what attention reads beside them, output, gate, gated output, statistics."""
        queries, gate, keys, values = self._parts()
        is_normed_first = self.qk_norm in ("head", "all_heads")
        is_clipped = self.clip is not None and (is_normed_first or not self.rotary_dim)
        copies = (is_normed_first or self.rotary_dim > 0) + (self.qk_norm == "weightless") + is_clipped
        # Nothing reads the projections again where all parts are copies.
        is_copied = self.value_scale != 1.0 and self.rotary_dim > 0 and not is_normed_first
        is_read = self.clip is not None or gate > 0 or not is_copied
        kept = sum(self._parts()) * is_read + copies * (queries + keys)
        kept += (queries * (not copies) + 1) * (self.temperature > 0)
        kept += values * (self.value_scale != 1.0 or self.clip is not None)
        kept += self._outputs() * (1 + (self.output_gate != "none")) + gate
        rows = {"none": 0, "all_heads": 2}.get(self.qk_norm, self.num_heads + self.num_key_heads)
        return element_bytes * kept + 4 * (self.num_heads + rows + (self.chunk is not None))

    def tp_plan(self, width: int) -> Mapping[str, TPShard]:
        """Heads are the unit; a key head is shared by its group of query heads."""
        tp_plan = {
            "in_proj.weight": TPShard(0, self._parts()),
            "out_proj.weight": TPShard(1),
        }
        if self.has_bias:
            tp_plan["in_proj.bias"] = TPShard(0, self._parts())
        if self.has_output_bias:
            tp_plan["out_proj.bias"] = TPShard(None)
        if self.has_sinks:
            tp_plan["sinks"] = TPShard(0)
        if any(self._normed()):
            split = TPShard(0) if self.qk_norm == "all_heads" else TPShard(None)
            tp_plan |= {"q_norm.weight": split, "k_norm.weight": split}
        return tp_plan

    @property
    def context_exchange(self) -> Literal["gather", "state"]:
        """Keys and values are gathered; with a window or chunks the left neighbour's tail is enough."""
        return "gather"


class Attn(Mixer):
    """Softmax attention; one projection makes queries, gates, keys and values."""

    fusible = ("_prepare", "_close")

    def __init__(self, config: AttnConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.config, self.parts = config, config._parts()
        self.in_proj = Linear(width, sum(self.parts), init_std, has_bias=config.has_bias)
        self.out_proj = Linear(config._outputs(), width, out_std, has_bias=config.has_output_bias)
        if any(config._normed()):
            is_zero_centered = config.has_zero_centered_norm
            self.q_norm, self.k_norm = (
                RMSNorm(dim, config.norm_eps, is_zero_centered=is_zero_centered) for dim in config._normed()
            )
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.has_sinks else None
        self.initial = {"sinks": Initial("constant", 0.0, is_float32=True)} if config.has_sinks else {}

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """Queries see the keys of their own document, up to themselves and inside the window or chunk."""
        config = self.config
        q, gate, k, v = self.in_proj(x).split(self.parts, dim=-1)
        if config.qk_norm == "all_heads":
            q, k = self.q_norm(q, self.head_shards), self.k_norm(k, self.head_shards)
        table = None
        if config.rotary_dim:
            table = sequence.rotary_table(config.rotary_dim, config.rotary_theta, config.rotary_scaling)
        q, k, v = self._prepare(q, k, v, table, sequence.position)
        local = config.window or config.chunk
        view = sequence.view(None if local is None else local - 1)
        out = attention(
            view.queries(q),
            view.keys(k),
            view.keys(v),
            scale=config.head_dim**-0.5 if config.scale is None else config.scale,
            window=local,
            # A chunk is a window of one whole block.
            block=config.chunk or 1,
            sinks=self.sinks,
            logit_cap=config.logit_cap,
            document=view.document,
            position=view.position,
            q_index=view.q_index,
        )
        return self._close(view.restore(out), gate)

    def _close(self, out: Tensor, gate: Tensor) -> Tensor:
        """The gated output of all heads, projected."""
        if self.config.output_gate == "head":
            out = out * gate.sigmoid()[..., None]
        out = out.flatten(-2)
        if self.config.output_gate == "channel":
            out = out * gate.sigmoid()
        return self.out_proj(out)

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, table: tuple[Tensor, Tensor] | None, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads apart; normed, clipped, rotated and scaled as the fields say."""
        config = self.config
        if config.clip is not None:
            q, k, v = (part.clamp(-config.clip, config.clip) for part in (q, k, v))
        q, k = (part.unflatten(-1, (-1, config.head_dim)) for part in (q, k))
        v = v.unflatten(-1, (-1, config.value_dim))
        if config.value_scale != 1.0:
            v = v * config.value_scale
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, *table, config.rotary_layout), rotate(k, *table, config.rotary_layout)
        if config.qk_norm == "weightless":
            ones = q.new_ones(config.head_dim)
            q, k = rms_norm(q, ones, config.norm_eps), rms_norm(k, ones, config.norm_eps)
        if config.temperature:
            q = q * self._temperature(position)[:, :, None, None].to(q.dtype)
        return q, k, v

    def _temperature(self, position: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Factor on queries that grows with the logarithm of the position (arXiv 2501.19399)."""
        steps = torch.div(position + 1, self.config.temperature_interval, rounding_mode="floor")
        return 1 + self.config.temperature * steps.float().log1p()
