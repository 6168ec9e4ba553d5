"""MiniMax-Text-01 and M1: lightning and softmax attention, a residual stream that is the normed one.

Heads are rotated in part where rotary_dim says so, as the published checkpoints mean it. transformers rotates
all of a head whatever rotary_dim says, so it computes something else from those.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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
    layer_types,
    layout_lines,
    mixers_of,
    plain_layer,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece, head_rows
from model.mixers.lightning import LightningConfig, fixed_log_decay

KINDS = {"linear_attention": "lightning", "full_attention": "attn"}
W_NAMES = ("w1.weight", "w3.weight", "w2.weight")
# Tokens of a block, of how attention is computed.
BLOCK = 256
PAIRS: Pairs = SIZES | {
    "intermediate_size": "moe.hidden",
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "sliding_window": ("mixer.attn.window", None),
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "mlp_alpha_factor": ("residual.alpha", 1.0),
    "mlp_beta_factor": ("residual.beta", 1.0),
}
# The names that the configs of the first release have.
ALIASES = {
    "num_experts": "num_local_experts",
    "attn_type_list": "layer_types",
    "layernorm_mlp_alpha": "mlp_alpha_factor",
    "layernorm_mlp_beta": "mlp_beta_factor",
    "layernorm_full_attention_alpha": "full_attn_alpha_factor",
    "layernorm_full_attention_beta": "full_attn_beta_factor",
    "layernorm_linear_attention_alpha": "linear_attn_alpha_factor",
    "layernorm_linear_attention_beta": "linear_attn_beta_factor",
}
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "postnorm": (True,),
    "shared_intermediate_size": (0,),
}
FIXED = (
    *("moe=softmax", "moe.shared_hidden=0", "moe.has_shared_gate=false", "residual=scaled_post_norm"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none", "mixer.lightning.decay=alibi_like"),
)


def read_more(fields: Fields) -> list[str]:
    """Layout, rotary, and dims that both kinds of attention share."""
    depth, heads = fields.take("num_hidden_layers"), fields.take("num_attention_heads")
    dim = fields.take("head_dim", None) or fields.take("hidden_size") // heads
    for name in ("alpha", "beta"):
        # All three residuals of a layer have one pair of factors.
        factor = fields.take(f"mlp_{name}_factor", 1.0)
        for kind in ("full_attn", "linear_attn"):
            if fields.take(f"{kind}_{name}_factor", 1.0) != factor:
                raise CheckpointError(f"{kind}_{name}_factor is not mlp_{name}_factor, {factor}")
    # Of training, of a shared expert that is not there, and of how attention is computed.
    for name in ("router_aux_loss_coef", "shared_moe_mode", "block_size"):
        fields.take(name, None)
    every = ["linear_attention" if index % 2 else "full_attention" for index in range(depth)]
    # The first release has numbers for them.
    names: dict[Any, str] = {**KINDS, 0: "lightning", 1: "attn"}
    mixers = mixers_of(fields, every, names)
    return [
        f"mixer.attn.head_dim={dim}",
        f"mixer.attn.rotary_dim={fields.take('rotary_dim', None) or dim}",
        f"mixer.lightning.num_heads={heads}",
        f"mixer.lightning.key_dim={dim}",
        f"mixer.lightning.value_dim={dim}",
        *rotary_lines(fields, "attn", 1e6),
        *layout_lines(mixers, ["moe"] * depth),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout, rotary, and the factors of the residuals."""
    attn, residual = attn_of(config), config.residual
    kinds = ("full_attn", "linear_attn")
    return {
        "layer_types": layer_types(config, KINDS),
        "head_dim": attn.head_dim,
        "rotary_dim": attn.rotary_dim,
        "block_size": BLOCK,
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling),
        "router_aux_loss_coef": config.moe.balance_loss,
        **{f"{kind}_alpha_factor": residual.alpha for kind in kinds},
        **{f"{kind}_beta_factor": residual.beta for kind in kinds},
    }


def decay_buffers(config: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The decays within a block of tokens, which transformers expects in checkpoints."""
    step = torch.arange(1.0, BLOCK + 1.0)
    apart = step[:, None] - step
    for index, layer in enumerate(config.layers):
        mixer, prefix = config.mixer[layer.mixer], f"model.layers.{index}.self_attn."
        if isinstance(mixer, LightningConfig):
            depth = config.model.depth
            rate = -fixed_log_decay("alibi_like", mixer.num_heads, index, depth, step)[:, None, None]
            yield f"{prefix}slope_rate", rate
            yield f"{prefix}query_decay", (-rate * step[:, None]).exp()
            yield f"{prefix}key_decay", (-rate * (BLOCK - step[:, None])).exp()
            between = torch.where(apart >= 0, -rate * apart, float("-inf"))
            yield f"{prefix}diagonal_decay", between[None].exp()


def write_first_release(config: Architecture) -> dict[str, Any]:
    """The same, also as the code that came with the first release reads it."""
    attn, found = attn_of(config), write_more(config)
    if attn.rotary_scaling.kind != "none":
        raise CheckpointError("mixer.attn.rotary_scaling is not in the config of the first release")
    factors = found | {"mlp_alpha_factor": config.residual.alpha, "mlp_beta_factor": config.residual.beta}
    older = {name: factors[new] for name, new in ALIASES.items() if new.endswith("_factor")}
    numbers = [int(layer.mixer == "attn") for layer in config.layers]
    return found | older | {"attn_type_list": numbers, "rope_theta": attn.rotary_theta}


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from plain_layer(index, layer)
        mixer, attention = config.mixer[layer.mixer], f"{theirs}self_attn."
        if isinstance(mixer, LightningConfig):
            yield from lightning_pieces(f"{ours}mixer.", attention, mixer, config.model.width)
        else:
            yield from attn_pieces(f"{ours}mixer.", attention, attn_of(config, layer.mixer), AttnNames())
        yield Piece(f"{ours}moe.router.weight", f"{theirs}block_sparse_moe.gate.weight")
        experts = f"{theirs}block_sparse_moe.experts."
        yield from experts_apart(config, f"{ours}moe.experts.", experts, W_NAMES)


def lightning_pieces(ours: str, theirs: str, lightning: LightningConfig, width: int) -> Iterator[Piece]:
    """Theirs has query, key and value of a head together, and the gate apart."""
    heads, dim = lightning.num_heads, lightning.key_dim
    size, shape = heads * dim, (3 * heads * dim, width)
    for part_index in range(3):
        mine = head_rows(heads, dim, 0, dim, first=part_index * size)
        other = head_rows(heads, 3 * dim, part_index * dim, dim)
        yield Piece(f"{ours}in_proj.weight", f"{theirs}qkv_proj.weight", mine, other, shape)
    yield Piece(f"{ours}in_proj.weight", f"{theirs}output_gate.weight", lambda x: x[3 * size :])
    yield Piece(f"{ours}out_norm.weight", f"{theirs}norm.weight")
    yield Piece(f"{ours}out_proj.weight", f"{theirs}out_proj.weight")


TEXT_01 = Family(
    "minimax",
    "MiniMaxForCausalLM",
    PAIRS,
    pieces,
    fixed=FIXED,
    expects=EXPECTS,
    read_more=read_more,
    write_more=write_more,
    aliases=ALIASES,
    derived=decay_buffers,
    ignored=(r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",),
)
FAMILIES = (
    TEXT_01,
    *(
        replace(
            TEXT_01,
            model_type=model_type,
            class_name=class_name,
            write_more=write_first_release,
            derived=lambda _: (),
        )
        for model_type, class_name in (
            ("minimax_text_01", "MiniMaxText01ForCausalLM"),
            ("minimax_m1", "MiniMaxM1ForCausalLM"),
        )
    ),
)
