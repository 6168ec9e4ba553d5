"""Gemma 2: windows and full attention in turn, four norms a layer, capped scores and logits."""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields, shown
from model.hf.parts import (
    AttnNames,
    attn_of,
    attn_pieces,
    feed_forward,
    layer_types,
    layout_lines,
    mixers_of,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece

PAIRS: dict[str, str | tuple[str, Any]] = {
    "hidden_size": "model.width",
    "num_hidden_layers": "model.depth",
    "vocab_size": "model.vocab_size",
    "intermediate_size": "model.ffn_hidden",
    "tie_word_embeddings": ("model.has_tied_embeddings", True),
    "initializer_range": ("model.init_std", 0.02),
    "final_logit_softcapping": ("model.logit_cap", 30.0),
    "rms_norm_eps": ("residual.norm_eps", 1e-6),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "head_dim": ("mixer.attn.head_dim", 256),
    "attn_logit_softcapping": ("mixer.attn.logit_cap", 50.0),
    "attention_bias": ("mixer.attn.has_bias", False),
    "sliding_window": ("mixer.swa.window", 4096),
}
FIXED = (
    *("residual=sandwich", "residual.has_zero_centered_norm=true", "model.activation.kind=geglu"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none"),
)
EXPECTS = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_dropout": (0.0,),
    "use_bidirectional_attention": (None, False),
}
NORMS = {
    "mixer_residual.norm": "input_layernorm",
    "mixer_residual.out_norm": "post_attention_layernorm",
    "ffn_residual.norm": "pre_feedforward_layernorm",
    "ffn_residual.out_norm": "post_feedforward_layernorm",
}


def read_more(fields: Fields) -> list[str]:
    """Layout, rotary and the scales of embeddings and scores."""
    depth, width = fields.take("num_hidden_layers"), fields.take("hidden_size")
    every = [("sliding_attention", "full_attention")[layer % 2] for layer in range(depth)]
    # Older configs have both spellings of the activation, and the size of the cache's window.
    fields.expect("hidden_act", "gelu_pytorch_tanh")
    fields.expect("sliding_window_size", fields.take("sliding_window", 4096))
    fields.take("cache_implementation", None)
    return [
        f"model.embedding_scale={shown(float(width) ** 0.5)}",
        f"mixer.attn.rotary_dim={fields.take('head_dim', 256)}",
        f"mixer.attn.scale={shown(float(fields.take('query_pre_attn_scalar', 256)) ** -0.5)}",
        f"mixer.attn.has_output_bias={shown(fields.take('attention_bias', False))}",
        *rotary_lines(fields, "attn", 10000.0),
        *layout_lines(mixers_of(fields, every), ["dense"] * depth),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout, rotary and the scale of scores."""
    attn = attn_of(config)
    scalar = attn.head_dim if attn.scale is None else round(attn.scale**-2)
    if attn.scale not in (None, float(scalar) ** -0.5):
        raise CheckpointError(f"mixer.attn.scale {attn.scale} is not a whole number to the power of -0.5")
    return {
        "layer_types": layer_types(config),
        "query_pre_attn_scalar": scalar,
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling),
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        for mine, name in NORMS.items():
            yield Piece(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
        attn, hidden = attn_of(config, layer.mixer), config.model.ffn_hidden
        yield from attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", attn, AttnNames())
        yield from feed_forward(f"{ours}ffn.", f"{theirs}mlp.", hidden, config.model.activation)


FAMILIES = (
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
    ),
)
