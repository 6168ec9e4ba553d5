"""Llama 4: chunked attention with rotary, full attention without; weights of experts scale their inputs."""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family, Nested, inside
from model.hf.fields import Fields, shown
from model.hf.parts import (
    SIZES,
    AttnNames,
    Pairs,
    attn_of,
    attn_pieces,
    experts_fused,
    feed_forward,
    layer_types,
    layout_lines,
    mixers_of,
    plain_layer,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece

KINDS = {"chunked_attention": "chunked", "full_attention": "nope"}
PAIRS: Pairs = SIZES | {
    "intermediate_size_mlp": ("model.ffn_hidden", 16384),
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "head_dim": ("mixer.attn.head_dim", 128),
    "attention_bias": ("mixer.attn.has_bias", False),
    "attention_chunk_size": ("mixer.chunked.chunk", 8192),
    "floor_scale": ("mixer.nope.temperature_interval", 8192),
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": ("moe.top_k", 1),
    "intermediate_size": "moe.hidden",
}
FIXED = (
    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("mixer.attn.output_gate=none", "mixer.attn.rotary_layout=interleaved"),
    *("moe.has_normalized_weights=false", "moe.weight_scale=1.0", "moe.scales_input=true"),
)


def read_more(fields: Fields) -> list[str]:
    """Layout, rotary, norms of queries and keys, and their temperature."""
    depth, interval = fields.take("num_hidden_layers"), fields.take("no_rope_layer_interval", 4)
    # The field is named for its zeros: they are the layers without rotary.
    has_rotary = fields.take("no_rope_layers", None) or [(i + 1) % interval != 0 for i in range(depth)]
    kinds = ["chunked_attention" if rotates else "full_attention" for rotates in has_rotary]
    mixers = mixers_of(fields, kinds, KINDS)
    if mixers != [KINDS[kind] for kind in kinds]:
        raise CheckpointError("layer_types and no_rope_layers differ: rotary layers are the chunked ones")
    step, experts = fields.take("interleave_moe_layer_step", 1), fields.take("moe_layers", None)
    experts = range(step - 1, depth, step) if experts is None else experts
    is_tuned, growth = fields.take("attn_temperature_tuning", True), fields.take("attn_scale", 0.1)
    for name in ("router_aux_loss_coef", "cache_implementation", "_attn_implementation_autoset"):
        fields.take(name, None)
    return [
        f"moe.shared_hidden={fields.take('intermediate_size')}",
        f"mixer.attn.rotary_dim={fields.take('head_dim', 128)}",
        f"mixer.attn.has_output_bias={shown(fields.take('attention_bias', False))}",
        f"mixer.attn.qk_norm={'weightless' if fields.take('use_qk_norm', True) else 'none'}",
        f"mixer.nope.temperature={shown(float(growth) if is_tuned else 0.0)}",
        *rotary_lines(fields, "attn", 500000.0),
        *layout_lines(mixers, ["moe" if layer in experts else "dense" for layer in range(depth)]),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout, rotary, norms of queries and keys, and their temperature."""
    attn, chunked, nope = attn_of(config), attn_of(config, "chunked"), attn_of(config, "nope")
    kinds = layer_types(config, KINDS)
    return {
        "layer_types": kinds,
        "no_rope_layers": [int(kind == "chunked_attention") for kind in kinds],
        "moe_layers": [index for index, layer in enumerate(config.layers) if layer.ffn == "moe"],
        "use_qk_norm": chunked.qk_norm == "weightless",
        "attn_temperature_tuning": nope.temperature > 0,
        "attn_scale": nope.temperature or 0.1,
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling),
        "router_aux_loss_coef": config.moe.balance_loss,
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from plain_layer(index, layer)
        attn = attn_of(config, layer.mixer)
        yield from attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", attn, AttnNames())
        theirs += "feed_forward."
        if layer.ffn == "dense":
            hidden = config.model.ffn_hidden
            yield from feed_forward(f"{ours}ffn.", theirs, hidden, config.model.activation)
            continue
        moe = config.moe
        yield Piece(f"{ours}moe.router.weight", f"{theirs}router.weight")
        names = ("gate_up_proj", "down_proj")
        yield from experts_fused(f"{ours}moe.experts.", f"{theirs}experts.", names, lambda x: x.mT)
        shared = f"{theirs}shared_expert."
        yield from feed_forward(f"{ours}moe.shared.", shared, moe.shared_hidden, moe.shared_activation)


TEXT = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    PAIRS,
    pieces,
    fixed=FIXED,
    expects={
        "hidden_act": ("silu",),
        "attention_dropout": (0.0,),
        "router_jitter_noise": (0.0,),
        "for_llm_compressor": (False,),
    },
    read_more=read_more,
    write_more=write_more,
)
BESIDE = Nested(
    ("llama4_text",),
    is_tied=None,
    silent=(
        *("vision_config", "image_token_index", "boi_token_index", "eoi_token_index"),
        *("image_token_id", "boi_token_id", "eoi_token_id"),
    ),
)
FAMILIES = (
    TEXT,
    inside(
        TEXT,
        "llama4",
        "Llama4ForCausalLM",
        BESIDE,
        {"": "language_model."},
        left_out=(r"vision_model\..*", r"multi_modal_projector\..*"),
    ),
)
