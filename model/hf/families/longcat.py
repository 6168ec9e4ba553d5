"""LongCat-Flash: two latent attentions and two dense feed-forwards a layer, experts beside them."""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.latent import UNUSED, latent_of, latent_pieces
from model.hf.parts import (
    experts_apart,
    feed_forward,
    layout_lines,
    rope_parameters,
    rotary_lines,
    skeleton,
)
from model.hf.pieces import Piece

PAIRS: dict[str, str | tuple[str, Any]] = {
    "hidden_size": "model.width",
    "vocab_size": "model.vocab_size",
    "ffn_hidden_size": "model.ffn_hidden",
    "tie_word_embeddings": ("model.has_tied_embeddings", False),
    "initializer_range": ("model.init_std", 0.02),
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.mla.num_heads",
    "q_lora_rank": "mixer.mla.query_latent_dim",
    "kv_lora_rank": "mixer.mla.latent_dim",
    "qk_nope_head_dim": "mixer.mla.key_dim",
    "qk_rope_head_dim": "mixer.mla.shared_key_dim",
    "v_head_dim": "mixer.mla.value_dim",
    "n_routed_experts": "moe.num_experts",
    "zero_expert_num": "moe.num_zero_experts",
    "moe_topk": "moe.top_k",
    "expert_ffn_hidden_size": "moe.hidden",
    "routed_scaling_factor": ("moe.weight_scale", 6.0),
}
FIXED = (
    *("moe=softmax", "moe.shared_hidden=0", "moe.has_shared_gate=false", *UNUSED),
    *("moe.has_normalized_weights=false", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("mixer.mla.has_latent_scale=true", "model.mtp.depth=0"),
)
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "attention_method": ("MLA",),
    "mla_scale_q_lora": (True,),
    "mla_scale_kv_lora": (True,),
    "norm_topk_prob": (False,),
    "router_bias": (False,),
    "zero_expert_type": ("identity",),
}


def read_more(fields: Fields) -> list[str]:
    """Each of their layers is two of ours: one whose experts join at the end of the next."""
    count, rotary = fields.take("num_layers"), fields.take("qk_rope_head_dim")
    fields.expect("num_hidden_layers", None, count, 2 * count)
    fields.expect("num_key_value_heads", fields.take("num_attention_heads"), None)
    fields.expect("qk_head_dim", rotary + fields.take("qk_nope_head_dim"), None)
    if fields.take("head_dim", 64) != rotary:
        raise CheckpointError(
            f"head_dim is {fields.take('head_dim', 64)}; expected qk_rope_head_dim, {rotary}"
        )
    return [
        f"model.depth={2 * count}",
        f"mixer.mla.rotary_dim={rotary}",
        *rotary_lines(fields, "mla", 1e7),
        *layout_lines(["mla"] * 2 * count, ["shortcut", "dense"] * count),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """What `read_more` reads. Raises CheckpointError for an odd depth."""
    latent, depth = latent_of(config, "mla"), config.model.depth
    if depth % 2:
        raise CheckpointError(f"model.depth {depth} must be even: a layer there is two here")
    return {
        "num_layers": depth // 2,
        "head_dim": latent.shared_key_dim,
        "num_key_value_heads": latent.num_heads,
        "rope_parameters": rope_parameters(latent.rotary_theta, latent.rotary_scaling),
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    shape = config.model
    for index, layer in enumerate(config.layers):
        ours, theirs, half = f"blocks.{index}.", f"model.layers.{index // 2}.", index % 2
        norms = {"mixer": "input_layernorm", "ffn": "post_attention_layernorm"}
        for part, name in norms.items():
            yield Piece(f"{ours}{part}_residual.norm.weight", f"{theirs}{name}.{half}.weight")
        latent = latent_of(config, layer.mixer)
        yield from latent_pieces(f"{ours}mixer.", f"{theirs}self_attn.{half}.", latent)
        yield from feed_forward(f"{ours}ffn.", f"{theirs}mlps.{half}.", shape.ffn_hidden, shape.activation)
        if layer.ffn == "shortcut":
            yield Piece(f"{ours}moe.router.weight", f"{theirs}mlp.router.classifier.weight")
            yield Piece(f"{ours}moe.router.bias", f"{theirs}mlp.router.e_score_correction_bias")
            yield from experts_apart(config, f"{ours}moe.experts.", f"{theirs}mlp.experts.")


def surplus(config: Architecture) -> Iterator[str]:
    """First projections of experts that return their input: transformers allocates and saves these."""
    for layer in range(config.model.depth // 2):
        for expert in range(config.moe.num_experts, config.moe.num_choices):
            for name in ("gate_proj", "up_proj"):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"


FAMILIES = (
    Family(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        aliases={
            "num_local_experts": "n_routed_experts",
            "num_experts_per_tok": "moe_topk",
            "intermediate_size": "ffn_hidden_size",
            "moe_intermediate_size": "expert_ffn_hidden_size",
        },
        surplus=surplus,
        float32=(r".*\.router\.classifier\.weight",),
        # The config.json does not say what the MTP module is made of.
        left_out=(r"model\.mtp\..*",),
    ),
)
