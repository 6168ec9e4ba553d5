"""gpt-oss: windows and full attention in turn, sinks and biases everywhere, clamped experts."""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields, shown
from model.hf.parts import (
    SIZES,
    AttnNames,
    Pairs,
    attn_of,
    attn_pieces,
    layer_types,
    layout_lines,
    mixers_of,
    plain_layer,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece

PAIRS: Pairs = SIZES | {
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "head_dim": ("mixer.attn.head_dim", 64),
    "sliding_window": ("mixer.swa.window", 128),
    "attention_bias": ("mixer.attn.has_bias", True),
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "intermediate_size": "moe.hidden",
    "swiglu_limit": ("moe.activation.limit", 7.0),
}
FIXED = (
    *("moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none", "mixer.attn.has_sinks=true"),
    *("moe.activation.kind=shifted_swiglu", "moe.activation.clamps_product=false"),
    *("moe.activation.limit_from=0", "moe.has_bias=true", "moe.has_router_bias=true"),
    *("moe.score=softmax_of_chosen", "moe.shared_hidden=0", "moe.has_shared_gate=false"),
)


def read_more(fields: Fields) -> list[str]:
    """Layout and rotary."""
    depth = fields.take("num_hidden_layers")
    every = [("sliding_attention", "full_attention")[layer % 2] for layer in range(depth)]
    rope = fields.take("rope_parameters", None) or fields.take("rope_scaling", None)
    if rope is None:
        raise CheckpointError("lacks rope_parameters or rope_scaling, which say how positions are stretched")
    fields.expect("initial_context_length", rope.get("original_max_position_embeddings"))
    fields.expect("experts_per_token", fields.take("num_experts_per_tok"))
    fields.take("router_aux_loss_coef", None)
    return [
        f"mixer.attn.rotary_dim={fields.take('head_dim', 64)}",
        f"mixer.attn.has_output_bias={shown(fields.take('attention_bias', True))}",
        *rotary_lines(fields, "attn", 150000.0),
        *layout_lines(mixers_of(fields, every), ["moe"] * depth),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout and rotary."""
    attn = attn_of(config)
    return {
        "layer_types": layer_types(config),
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
        yield Piece(f"{ours}moe.router.weight", f"{theirs}mlp.router.weight")
        yield Piece(f"{ours}moe.router.logit_bias", f"{theirs}mlp.router.bias")
        yield from expert_pieces(f"{ours}moe.experts.", f"{theirs}mlp.experts.", config)


def expert_pieces(ours: str, theirs: str, config: Architecture) -> Iterator[Piece]:
    """Theirs are transposed, and gates and ups alternate."""
    experts, hidden, width = config.moe.num_experts, config.moe.hidden, config.model.width
    name, shape = f"{theirs}gate_up_proj", (experts, width, 2 * hidden)
    yield Piece(f"{ours}gate_up", name, lambda x: x[:, :hidden], lambda x: x.mT[:, 0::2], shape)
    yield Piece(f"{ours}gate_up", name, lambda x: x[:, hidden:], lambda x: x.mT[:, 1::2], shape)
    name, shape = f"{theirs}gate_up_proj_bias", (experts, 2 * hidden)
    yield Piece(f"{ours}gate_up_bias", name, lambda x: x[:, :hidden], lambda x: x[:, 0::2], shape)
    yield Piece(f"{ours}gate_up_bias", name, lambda x: x[:, hidden:], lambda x: x[:, 1::2], shape)
    yield Piece(f"{ours}down", f"{theirs}down_proj", lambda x: x.mT)
    yield Piece(f"{ours}down_bias", f"{theirs}down_proj_bias")


FAMILIES = (
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects={"hidden_act": ("silu",), "attention_dropout": (0.0,), "swiglu_alpha": (1.702,)},
        read_more=read_more,
        write_more=write_more,
        aliases={"num_experts": "num_local_experts"},
    ),
)
