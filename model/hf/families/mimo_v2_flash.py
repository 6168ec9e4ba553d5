"""MiMo-V2-Flash: windows with sinks and twice the key heads among full attention, sigmoid experts."""

from collections.abc import Iterator
from typing import Any

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
    layer_types,
    layout_lines,
    lines,
    mixers_of,
    plain_layer,
    rope_parameters,
    rotary_of,
    rotary_share,
    skeleton,
)
from model.hf.pieces import Piece

PAIRS: Pairs = SIZES | {
    "intermediate_size": ("model.ffn_hidden", 16384),
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "head_dim": ("mixer.attn.head_dim", 192),
    "v_head_dim": ("mixer.attn.value_dim", 128),
    "attention_bias": ("mixer.attn.has_bias", False),
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden",
    "n_group": ("moe.num_groups", 1),
    "topk_group": ("moe.kept_groups", 1),
    "norm_topk_prob": ("moe.has_normalized_weights", True),
}
FIXED = (
    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none", "mixer.swa.has_sinks=true"),
    "moe.shared_hidden=0",
)
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "add_swa_attention_sink_bias": (True,),
    "add_full_attention_sink_bias": (False,),
    "n_shared_experts": (None, 0),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hybrid_block_size": (None,),
}
# The names of the older fields for each kind of layer.
ROPES = {"attn": ("full_attention", "rope_theta", 5e6), "swa": ("sliding_attention", "swa_rope_theta", 1e4)}
SHARE = 0.334


def read_more(fields: Fields) -> list[str]:
    """Layout, rotary, windows and scales."""
    depth, heads = fields.take("num_hidden_layers"), fields.take("num_attention_heads")
    key_heads, head_dim = fields.take("num_key_value_heads"), fields.take("head_dim", 192)
    fields.expect("swa_num_attention_heads", heads)
    fields.expect("swa_num_key_value_heads", 2 * key_heads)
    fields.expect("swa_head_dim", head_dim)
    fields.expect("swa_v_head_dim", fields.take("v_head_dim", 128))
    tree = {
        "mixer": {
            "attn": {"value_scale": float(_given(fields, "attention_value_scale", 0.707))},
            "swa": {"num_key_heads": 2 * key_heads, "window": window_of(fields)},
        },
        "moe": {"weight_scale": float(_given(fields, "routed_scaling_factor", 1.0))},
    }
    return [
        *lines(tree),
        *rotary_by_layer(fields, head_dim),
        *layout_lines(mixers_of(fields, _kinds(fields, depth)), _ffns(fields, depth)),
    ]


def _kinds(fields: Fields, depth: int) -> list[str]:
    """Kinds of layers where the config has no layer_types: full attention first and in every sixth."""
    is_sliding = fields.take("hybrid_layer_pattern", None)
    if is_sliding is None:
        is_sliding = [layer > 0 and (layer + 1) % 6 != 0 for layer in range(depth)]
    return ["sliding_attention" if slides else "full_attention" for slides in is_sliding]


def _ffns(fields: Fields, depth: int) -> list[str]:
    """The first layer is dense where the config does not say."""
    has_experts = fields.take("moe_layer_freq", None)
    if has_experts is None:
        has_experts = [layer > 0 for layer in range(depth)]
    kinds = ["sparse" if has else "dense" for has in has_experts]
    kinds = fields.take("mlp_layer_types", None) or kinds
    return [{"sparse": "moe"}.get(kind, kind) for kind in kinds]


def window_of(fields: Fields) -> int:
    """Keys that a query sees, itself included.

    sliding_window_size counts the tokens before it, and is what the published model runs with; sliding_window
    counts it too, and says less where both are given.
    """
    window, before = fields.take("sliding_window", 129), fields.take("sliding_window_size", None)
    fields.expect("attention_chunk_size", before, None)
    return window if before is None else before + 1


def _given(fields: Fields, name: str, default: float) -> float:
    """A factor; null is 1."""
    value = fields.take(name, default)
    return 1.0 if value is None else value


def rotary_by_layer(fields: Fields, head_dim: int) -> list[str]:
    """Overrides for the rotary fields of both kinds of layers."""
    nested = fields.take("rope_parameters", None) or {}
    fields.expect("rope_scaling", None)
    share = fields.take("partial_rotary_factor", None)
    found = []
    for mixer, (kind, name, default) in ROPES.items():
        rope = {"rope_theta": fields.take(name, default), **nested.get(kind, {})}
        rope.setdefault("partial_rotary_factor", SHARE if share is None else share)
        found.append(f"mixer.{mixer}.rotary_dim={int(head_dim * rope['partial_rotary_factor'])}")
        found += rotary_of(rope, mixer)
    return found


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout, rotary, windows and scales."""
    attn, swa = attn_of(config), attn_of(config, "swa")
    ropes = {}
    for mixer, (kind, _, _) in ROPES.items():
        one = attn_of(config, mixer)
        share = rotary_share(one.rotary_dim, one.head_dim)
        ropes[kind] = rope_parameters(one.rotary_theta, one.rotary_scaling, partial_rotary_factor=share)
    return {
        "layer_types": layer_types(config),
        "mlp_layer_types": ["sparse" if layer.ffn == "moe" else layer.ffn for layer in config.layers],
        "sliding_window": swa.window,
        "attention_value_scale": attn.value_scale,
        "routed_scaling_factor": config.moe.weight_scale,
        "rope_parameters": ropes,
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from plain_layer(index, layer)
        attn, names = attn_of(config, layer.mixer), AttnNames(sinks="attention_sink_bias")
        yield from attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", attn, names)
        if layer.ffn == "dense":
            hidden = config.model.ffn_hidden
            yield from feed_forward(f"{ours}ffn.", f"{theirs}mlp.", hidden, config.model.activation)
            continue
        yield Piece(f"{ours}moe.router.weight", f"{theirs}mlp.gate.weight")
        yield Piece(f"{ours}moe.router.bias", f"{theirs}mlp.gate.e_score_correction_bias")
        yield from experts_apart(config, f"{ours}moe.experts.", f"{theirs}mlp.experts.")


FAMILIES = (
    Family(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        aliases={"layernorm_epsilon": "rms_norm_eps", "num_local_experts": "n_routed_experts"},
        left_out=(r"model\.mtp\..*",),
    ),
)
