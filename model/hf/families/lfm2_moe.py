"""LFM2 with experts: gated short convolutions, some attention, sigmoid experts."""

from collections.abc import Iterator
from typing import Any

from model.config import Architecture
from model.hf.families.glm4_moe import leading_of
from model.hf.families.gqa import ExpertNames, ffn_pieces, head_dim_of
from model.hf.family import TIED, Family
from model.hf.fields import Fields
from model.hf.parts import (
    AttnNames,
    Pairs,
    attn_of,
    attn_pieces,
    layer_types,
    layout_lines,
    mixers_of,
    norms,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece

KINDS = {"conv": "conv", "full_attention": "attn"}
W_NAMES = ("w1.weight", "w3.weight", "w2.weight")
NAMES = ExpertNames(
    "feed_forward.gate",
    "feed_forward.experts",
    W_NAMES,
    bias="feed_forward.expert_bias",
    dense="feed_forward.",
)
ATTN_NAMES = AttnNames(o="out_proj", q_norm="q_layernorm.weight", k_norm="k_layernorm.weight")
PAIRS: Pairs = {
    "hidden_size": "model.width",
    "num_hidden_layers": "model.depth",
    "vocab_size": "model.vocab_size",
    "intermediate_size": "model.ffn_hidden",
    "initializer_range": ("model.init_std", 0.02),
    "norm_eps": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "conv_L_cache": ("mixer.conv.conv_width", 3),
    "num_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden",
    "norm_topk_prob": ("moe.has_normalized_weights", True),
    "routed_scaling_factor": ("moe.weight_scale", 1.0),
}
FIXED = (
    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("moe.weight_eps=1e-6", "moe.shared_hidden=0", "moe.has_shared_gate=false"),
    *("mixer.attn.output_gate=none", "mixer.attn.qk_norm=head"),
)


def read_more(fields: Fields) -> list[str]:
    """Layout, rotary and tied embeddings, which have two names."""
    depth, dim = fields.take("num_hidden_layers"), head_dim_of(fields)
    tied = fields.take("tie_embedding", None)
    if tied is not None:
        fields.settle(TIED, tied)
    leading = fields.take("num_dense_layers", 2)
    ffns = ["dense" if layer < leading else "moe" for layer in range(depth)]
    return [
        f"model.has_tied_embeddings={str(fields.take(TIED, True)).lower()}",
        f"mixer.attn.head_dim={dim}",
        f"mixer.attn.rotary_dim={dim}",
        *rotary_lines(fields, "attn", 1e6),
        *layout_lines(mixers_of(fields, fields.take("layer_types"), KINDS), ffns),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """What `read_more` reads."""
    attn = attn_of(config)
    return {
        TIED: config.model.has_tied_embeddings,
        "head_dim": attn.head_dim,
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling),
        "layer_types": layer_types(config, KINDS),
        "num_dense_layers": leading_of(config),
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config, norm="model.embedding_norm.weight")
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from norms(index, layer, ("operator_norm.weight", "ffn_norm.weight"))
        if layer.mixer == "conv":
            yield Piece(f"{ours}mixer.conv.weight", f"{theirs}conv.conv.weight", lambda x: x[:, None])
            for name in ("in_proj", "out_proj"):
                yield Piece(f"{ours}mixer.{name}.weight", f"{theirs}conv.{name}.weight")
        else:
            attn = attn_of(config, layer.mixer)
            yield from attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", attn, ATTN_NAMES)
        yield from ffn_pieces(config, ours, theirs, layer.ffn, NAMES)


FAMILIES = (
    Family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects={"conv_bias": (False,), "use_expert_bias": (True,)},
        read_more=read_more,
        write_more=write_more,
        aliases={"num_local_experts": "num_experts"},
    ),
)
