"""Jamba: an attention without positions among Mamba layers, experts in every other feed-forward."""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.parts import (
    SIZES,
    AttnNames,
    Pairs,
    attn_of,
    attn_pieces,
    experts_apart,
    feed_forward,
    layout_lines,
    norms,
    skeleton,
)
from model.hf.pieces import Piece
from model.mixers.mamba import MambaConfig

PAIRS: Pairs = SIZES | {
    "rms_norm_eps": ("residual.norm_eps", 1e-6),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "mamba_d_state": ("mixer.mamba.state_dim", 16),
    "mamba_d_conv": ("mixer.mamba.conv_width", 4),
    "mamba_conv_bias": ("mixer.mamba.has_conv_bias", True),
    "num_experts": ("moe.num_experts", 16),
    "num_experts_per_tok": ("moe.top_k", 2),
}
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "mamba_proj_bias": (False,),
    "mamba_inner_layernorms": (True,),
    "sliding_window": (None,),
}
FIXED = (
    *("residual=pre_norm", "residual.has_zero_centered_norm=false", "moe=softmax"),
    *("moe.has_normalized_weights=false", "moe.shared_hidden=0", "moe.has_shared_gate=false"),
    *("mixer.attn.rotary_dim=0", "mixer.attn.qk_norm=none", "mixer.attn.output_gate=none"),
    "mixer.mamba.has_inner_norm=true",
)
# Of training, and of how things are computed.
UNUSED = (
    *("router_aux_loss_coef", "use_mamba_kernels", "use_mambapy", "use_associative_scan"),
    *("num_logits_to_keep", "calc_logits_for_entire_prompt"),
)


def read_more(fields: Fields) -> list[str]:
    """Layouts by period and offset, and sizes that follow from others."""
    for name in UNUSED:
        fields.take(name, None)
    depth, width = fields.take("num_hidden_layers"), fields.take("hidden_size")
    is_attn = every(depth, fields.take("attn_layer_period", 8), fields.take("attn_layer_offset", 4))
    is_moe = every(depth, fields.take("expert_layer_period", 2), fields.take("expert_layer_offset", 1))
    if fields.take("num_experts", 16) == 1:
        is_moe = [False] * depth
    rank, hidden = fields.take("mamba_dt_rank", "auto"), fields.take("intermediate_size")
    return [
        f"model.ffn_hidden={hidden}",
        f"moe.hidden={hidden}",
        f"mixer.attn.head_dim={width // fields.take('num_attention_heads')}",
        f"mixer.mamba.num_channels={fields.take('mamba_expand', 2) * width}",
        f"mixer.mamba.dt_rank={-(-width // 16) if rank == 'auto' else rank}",
        *layout_lines(
            ["attn" if found else "mamba" for found in is_attn],
            ["moe" if found else "dense" for found in is_moe],
        ),
    ]


def every(depth: int, period: int, offset: int) -> list[bool]:
    """For each layer whether it stands at the offset of a period."""
    return [layer % period == offset for layer in range(depth)]


def period_and_offset(found: list[bool], name: str) -> tuple[int, int]:
    """What gives these layers; past the last one where there are none. Raises CheckpointError without any."""
    depth = len(found)
    for period in range(1, depth + 2):
        for offset in range(period):
            if every(depth, period, offset) == found:
                return period, offset
    raise CheckpointError(f"has no layout in which {name} does not come in one period")


def mamba_of(config: Architecture) -> MambaConfig:
    """The state space. Raises CheckpointError without it."""
    found = config.mixer.get("mamba")
    if not isinstance(found, MambaConfig):
        raise CheckpointError("mixer.mamba is not Mamba")
    return found


def write_more(config: Architecture) -> dict[str, Any]:
    """Layouts by period and offset, and sizes that others follow from."""
    mamba, layers = mamba_of(config), config.layers
    attn = period_and_offset([layer.mixer == "attn" for layer in layers], "attn")
    experts = period_and_offset([layer.ffn == "moe" for layer in layers], "moe")
    has_experts = any(layer.ffn == "moe" for layer in layers)
    return {
        "attn_layer_period": attn[0],
        "attn_layer_offset": attn[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "intermediate_size": config.moe.hidden if has_experts else config.model.ffn_hidden,
        "mamba_expand": mamba.num_channels // config.model.width,
        "mamba_dt_rank": mamba.dt_rank,
        "router_aux_loss_coef": config.moe.balance_loss,
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config, norm="model.final_layernorm.weight")
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from norms(index, layer, ("input_layernorm.weight", "pre_ff_layernorm.weight"))
        if layer.mixer == "mamba":
            yield from mamba_pieces(f"{ours}mixer.", f"{theirs}mamba.", mamba_of(config))
        else:
            attn = attn_of(config, layer.mixer)
            yield from attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", attn, AttnNames())
        block = f"{theirs}feed_forward."
        if layer.ffn == "dense":
            hidden = config.model.ffn_hidden
            yield from feed_forward(f"{ours}ffn.", block, hidden, config.model.activation)
        else:
            yield Piece(f"{ours}moe.router.weight", f"{block}router.weight")
            yield from experts_apart(config, f"{ours}moe.experts.", f"{block}experts.")


def mamba_pieces(ours: str, theirs: str, mamba: MambaConfig) -> Iterator[Piece]:
    """Projections in the same order of parts as ours; theirs calls keys b and queries c."""
    yield Piece(f"{ours}conv.weight", f"{theirs}conv1d.weight", lambda x: x[:, None])
    if mamba.has_conv_bias:
        yield Piece(f"{ours}conv.bias", f"{theirs}conv1d.bias")
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        yield Piece(f"{ours}{name}.weight", f"{theirs}{name}.weight")
    for mine, name in (("dt_norm", "dt"), ("k_norm", "b"), ("q_norm", "c")):
        yield Piece(f"{ours}{mine}.weight", f"{theirs}{name}_layernorm.weight")
    for mine, name in (("step.A_log", "A_log"), ("step.dt_bias", "dt_proj.bias"), ("skip", "D")):
        yield Piece(f"{ours}{mine}", f"{theirs}{name}")


FAMILIES = (
    Family(
        "jamba",
        "JambaForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        aliases={"num_local_experts": "num_experts"},
    ),
)
