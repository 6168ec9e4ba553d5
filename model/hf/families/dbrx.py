"""DBRX: clipped grouped-query attention over softmax experts whose rows are stacked."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.parts import attn_of, layout_lines, lines, norms, rope_parameters, rotary_of, skeleton
from model.hf.pieces import Piece

PAIRS: dict[str, str | tuple[str, Any]] = {
    "d_model": "model.width",
    "n_layers": "model.depth",
    "vocab_size": "model.vocab_size",
    "initializer_range": ("model.init_std", 0.02),
    "n_heads": "mixer.attn.num_heads",
}
FIXED = (
    *("moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    # The published code leaves the norms at the default of torch.
    *("residual.norm=layer", "residual.norm_eps=0.00001", "model.has_tied_embeddings=false"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none"),
    *("moe.shared_hidden=0", "moe.has_shared_gate=false"),
)


def read_more(fields: Fields) -> list[str]:
    """What stands in attn_config and ffn_config."""
    depth, width = fields.take("n_layers"), fields.take("d_model")
    head_dim = width // fields.take("n_heads")
    attn, ffn = fields.node("attn_config"), fields.node("ffn_config")
    theta = attn.take("rope_theta", None)
    rope = fields.take("rope_parameters", None) or {"rope_theta": fields.take("rope_theta", theta)}
    if theta is not None and rope.get("rope_theta") != theta:
        # transformers 5 gives rope_parameters its own default when it reads a config without them.
        found = f"rope_theta is {theta} in attn_config, but {rope.get('rope_theta')} for the whole model"
        raise CheckpointError(f"{found}; drop the wrong one")
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = 10000.0
    attn.expect("attn_pdrop", 0.0)
    fields.expect("num_key_value_heads", attn.take("kv_n_heads", 1))
    ffn.expect("ffn_act_fn", {"name": "silu"}, None)
    ffn.expect("hidden_size", width)
    ffn.expect("moe_normalize_expert_weights", 1.0, None)
    for name in ("moe_loss_weight", "moe_jitter_eps"):
        ffn.take(name, None)
    for name in ("max_seq_len", "router_aux_loss_coef"):
        fields.take(name, None)
    mixer = {
        "num_key_heads": attn.take("kv_n_heads", 1),
        "clip": attn.take("clip_qkv", None),
        "head_dim": head_dim,
        "rotary_dim": head_dim,
    }
    moe = {
        "num_experts": ffn.take("moe_num_experts", 4),
        "top_k": ffn.take("moe_top_k", 1),
        "hidden": ffn.take("ffn_hidden_size", 3584),
        "has_normalized_weights": ffn.take("moe_normalize_expert_weights", 1.0) is not None,
    }
    attn.finish()
    ffn.finish()
    tree = lines({"mixer": {"attn": mixer}, "moe": moe})
    return [*tree, *rotary_of(rope, "attn"), *layout_lines(["attn"] * depth, ["moe"] * depth)]


def write_more(config: Architecture) -> dict[str, Any]:
    """What stands in attn_config and ffn_config."""
    attn, moe = attn_of(config), config.moe
    return {
        "attn_config": {
            "kv_n_heads": attn.num_key_heads,
            "clip_qkv": attn.clip,
            "rope_theta": attn.rotary_theta,
        },
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": moe.hidden,
            "moe_num_experts": moe.num_experts,
            "moe_top_k": moe.top_k,
            "moe_loss_weight": moe.balance_loss,
            "moe_normalize_expert_weights": 1.0 if moe.has_normalized_weights else None,
        },
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling),
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    names = {"embed": "transformer.wte.weight", "norm": "transformer.norm_f.weight"}
    yield from skeleton(config, **names)
    experts, hidden, width = config.moe.num_experts, config.moe.hidden, config.model.width
    shape = (experts * hidden, width)

    def by_expert(x: Tensor) -> Tensor:
        return x.view(experts, hidden, width)

    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"transformer.blocks.{index}."
        halves = ("norm_attn_norm.norm_1.weight", "norm_attn_norm.norm_2.weight")
        yield from norms(index, layer, halves, "transformer.blocks.")
        yield Piece(f"{ours}mixer.in_proj.weight", f"{theirs}norm_attn_norm.attn.Wqkv.weight")
        yield Piece(f"{ours}mixer.out_proj.weight", f"{theirs}norm_attn_norm.attn.out_proj.weight")
        yield Piece(f"{ours}moe.router.weight", f"{theirs}ffn.router.layer.weight")
        ours, theirs = f"{ours}moe.experts.", f"{theirs}ffn.experts.mlp."
        yield Piece(f"{ours}gate_up", f"{theirs}w1", lambda x: x[:, :hidden], by_expert, shape)
        yield Piece(f"{ours}gate_up", f"{theirs}v1", lambda x: x[:, hidden:], by_expert, shape)
        yield Piece(f"{ours}down", f"{theirs}w2", lambda x: x.mT, by_expert, shape)


FAMILIES = (
    Family(
        "dbrx",
        "DbrxForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects={"resid_pdrop": (0.0,), "emb_pdrop": (0.0,), "tie_word_embeddings": (False,)},
        read_more=read_more,
        write_more=write_more,
        aliases={"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
    ),
)
