"""MiniMax-M3: attention over chosen blocks after a few full layers, clamped shifted experts everywhere."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family, Nested, inside
from model.hf.fields import Fields
from model.hf.parts import (
    SIZES,
    AttnNames,
    Pairs,
    attn_of,
    attn_pieces,
    experts_apart,
    experts_fused,
    feed_forward,
    joined_rows,
    layer_types,
    layout_lines,
    lines,
    mixers_of,
    plain_layer,
    rope_parameters,
    rotary_lines,
    rotary_share,
    skeleton,
)
from model.hf.pieces import Piece
from model.mixers.msa import MsaConfig

KINDS = {"full_attention": "attn", "minimax_m3_sparse": "msa"}
W_NAMES = ("w1.weight", "w3.weight", "w2.weight")
PAIRS: Pairs = SIZES | {
    "dense_intermediate_size": ("model.ffn_hidden", 12288),
    "swiglu_limit": ("model.activation.limit", 7.0),
    "rms_norm_eps": ("residual.norm_eps", 1e-6),
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "intermediate_size": "moe.hidden",
    "shared_intermediate_size": ("moe.shared_hidden", 3072),
    "routed_scaling_factor": ("moe.weight_scale", 2.0),
}
FIXED = (
    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=true"),
    *("model.activation.kind=shifted_swiglu", "mixer.attn.qk_norm=head", "mixer.attn.output_gate=none"),
)
EXPECTS = {
    "attention_dropout": (0.0,),
    "swiglu_alpha": (1.702,),
    "router_jitter_noise": (0.0,),
}
# Fields of the published config that transformers drops, with what they must be.
PUBLISHED = {
    "hidden_act": ("silu", "swigluoai"),
    "use_gemma_norm": (True,),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_head",),
    "attention_output_gate": (False,),
    "n_shared_experts": (1,),
    "scoring_func": ("sigmoid",),
    "use_routing_bias": (True,),
}
# What the published config has in sparse_attention_config; the names of transformers to those and ours.
INDEX = {
    "index_head_dim": ("sparse_index_dim", "index_dim", 128),
    "index_block_size": ("sparse_block_size", "block", 128),
    "index_topk_blocks": ("sparse_topk_blocks", "num_blocks", 16),
    "index_local_blocks": ("sparse_local_block", "num_local_blocks", 1),
}


def read_more(fields: Fields) -> list[str]:
    """Layout, rotary, heads of both mixers and the indexer."""
    depth, head_dim = fields.take("num_hidden_layers"), fields.take("head_dim", 128)
    for name, allowed in PUBLISHED.items():
        fields.expect(name, *allowed)
    for name in ("router_aux_loss_coef", "num_mtp_modules", "num_nextn_predict_layers"):
        fields.take(name, None)
    heads = {
        "num_heads": fields.take("num_attention_heads"),
        "num_key_heads": fields.take("num_key_value_heads"),
        "head_dim": head_dim,
        "rotary_dim": rotary_dim_of(fields, head_dim),
    }
    index, kinds = read_index(fields, heads["num_key_heads"])
    every = ["minimax_m3_sparse" if is_sparse else "full_attention" for is_sparse in kinds or [0] * depth]
    mixers = mixers_of(fields, every, KINDS)
    rotary = rotary_lines(fields, "attn", 5e6)
    theta = next(line.partition("=")[2] for line in rotary if ".rotary_theta=" in line)
    if "msa" in mixers and "mixer.attn.rotary_scaling.kind=none" not in rotary:
        raise CheckpointError("rope_parameters: block-sparse attention is built without rotary scaling")
    return [
        *lines({"mixer": {"attn": heads, "msa": heads | index}}),
        *rotary,
        f"mixer.msa.rotary_theta={theta}",
        *layout_lines(mixers, _ffns(fields, depth)),
    ]


def rotary_dim_of(fields: Fields, head_dim: int) -> int:
    """Dims of a head that are rotated. Raises CheckpointError for fields that differ."""
    share = fields.take("partial_rotary_factor", None)
    share = (fields.take("rope_parameters", None) or {}).get("partial_rotary_factor", share)
    # transformers goes by the share alone, without which all dims are rotated.
    rotary = head_dim if share is None else int(head_dim * share)
    if fields.take("rotary_dim", rotary) != rotary:
        raise CheckpointError(
            f"rotary_dim is {fields.take('rotary_dim')}; partial_rotary_factor says {rotary}"
        )
    return rotary


def read_index(fields: Fields, key_heads: int) -> tuple[dict[str, int], list[int] | None]:
    """Fields of the indexer, and which layers have one where the published config says it."""
    older = fields.node("sparse_attention_config")
    kinds = older.take("sparse_attention_freq", None)
    for name, allowed in (
        ("use_sparse_attention", True),
        ("sparse_score_type", "max"),
        ("sparse_init_block", 0),
    ):
        older.expect(name, allowed)
    # The value path of the indexer, which the published layers with an indexer all go without.
    older.expect("sparse_disable_index_value", kinds)
    found = {
        ours: older.take(name, fields.take(flat, default)) for flat, (name, ours, default) in INDEX.items()
    }
    index_heads = older.take("sparse_num_index_heads", fields.take("index_n_heads", 4))
    if index_heads != key_heads:
        raise CheckpointError(f"index_n_heads {index_heads} must be num_key_value_heads {key_heads}")
    older.finish()
    return found, kinds


def _ffns(fields: Fields, depth: int) -> list[str]:
    """Feed-forwards by layer; all have experts where the config does not say."""
    has_experts = fields.take("moe_layer_freq", None) or [1] * depth
    kinds = fields.take("mlp_layer_types", None) or ["sparse" if has else "dense" for has in has_experts]
    return [{"sparse": "moe"}.get(kind, kind) for kind in kinds]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout, rotary, heads of both mixers and the indexer."""
    kinds, attn, msa = layer_types(config, KINDS), attn_of(config), msa_of(config)
    # Where no layer has full attention, its fields may be anything.
    heads = attn if "full_attention" in kinds else msa
    share = rotary_share(heads.rotary_dim, heads.head_dim)
    rope = rope_parameters(heads.rotary_theta, attn.rotary_scaling, partial_rotary_factor=share)
    return {
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if layer.ffn == "moe" else layer.ffn for layer in config.layers],
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_key_heads,
        "head_dim": heads.head_dim,
        "rotary_dim": heads.rotary_dim,
        "rope_parameters": rope,
        "index_n_heads": heads.num_key_heads,
        **{flat: getattr(msa, ours) for flat, (_, ours, _) in INDEX.items()},
        "router_aux_loss_coef": config.moe.balance_loss,
    }


def msa_of(config: Architecture) -> MsaConfig:
    """The block-sparse attention. Raises CheckpointError without it."""
    found = config.mixer.get("msa")
    if not isinstance(found, MsaConfig):
        raise CheckpointError("mixer.msa is not block-sparse attention")
    return found


def mixer_pieces(config: Architecture, index: int, indexer: str) -> Iterator[Piece]:
    """One layer's norms and mixer; `indexer` starts the names of the indexer's tensors."""
    layer, ours, theirs = config.layers[index], f"blocks.{index}.mixer.", f"model.layers.{index}.self_attn."
    yield from plain_layer(index, layer)
    if layer.mixer == "attn":
        yield from attn_pieces(ours, theirs, attn_of(config), AttnNames())
        return
    msa = msa_of(config)
    queries, keys = msa.num_heads * msa.head_dim, msa.num_key_heads * msa.head_dim
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    parts = {f"{theirs}{name}.weight": size for name, size in sizes.items()}
    yield from joined_rows(f"{ours}in_proj.weight", parts)
    yield Piece(f"{ours}out_proj.weight", f"{theirs}o_proj.weight")
    for name in ("q_norm", "k_norm"):
        yield Piece(f"{ours}{name}.weight", f"{theirs}{name}.weight")
    for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
        yield Piece(f"{ours}indexer.{name}.weight", f"{theirs}{indexer}{name}.weight")


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands in the published checkpoints, less the prefix."""
    model, moe = config.model, config.moe
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        yield from mixer_pieces(config, index, "index_")
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        if layer.ffn == "dense":
            yield from feed_forward(f"{ours}ffn.", f"{theirs}mlp.", model.ffn_hidden, model.activation)
            continue
        ours, theirs = f"{ours}moe.", f"{theirs}block_sparse_moe."
        yield Piece(f"{ours}router.weight", f"{theirs}gate.weight")
        yield Piece(f"{ours}router.bias", f"{theirs}e_score_correction_bias")
        yield from experts_apart(config, f"{ours}experts.", f"{theirs}experts.", W_NAMES)
        shared, activation = f"{theirs}shared_experts.", moe.shared_activation
        yield from feed_forward(f"{ours}shared.", shared, moe.shared_hidden, activation)


def text_pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands in a text model that transformers writes by itself: all is fused."""
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        yield from mixer_pieces(config, index, "indexer.")
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}.mlp."
        halves = {f"{ours}ffn.": theirs}
        if layer.ffn == "moe":
            ours += "moe."
            halves = {f"{ours}shared.": f"{theirs}shared_experts."}
            yield Piece(f"{ours}router.weight", f"{theirs}gate.weight")
            yield Piece(f"{ours}router.bias", f"{theirs}gate.e_score_correction_bias")
            names = ("gate_up_proj", "down_proj")
            yield from experts_fused(f"{ours}experts.", f"{theirs}experts.", names)
        for mine, name in halves.items():
            yield Piece(f"{mine}gate_up.weight", f"{name}gate_up_proj.weight")
            yield Piece(f"{mine}down.weight", f"{name}down_proj.weight")


TEXT = Family(
    "minimax_m3_vl_text",
    "MiniMaxM3VLForCausalLM",
    PAIRS,
    text_pieces,
    fixed=FIXED,
    expects=EXPECTS,
    read_more=read_more,
    write_more=write_more,
    aliases={"num_experts": "num_local_experts"},
    left_out=(r"mtp\..*",),
)
BESIDE = Nested(
    # The published config names no type, and older versions of transformers write an empty one.
    ("minimax_m3_vl_text", ""),
    is_tied=None,
    silent=(
        *("vision_config", "image_token_index", "video_token_index", "image_token_id", "video_token_id"),
        *("projector_hidden_size", "projector_hidden_act", "multimodal_projector_bias", "image_seq_length"),
        *("img_token_compression_config", "image_grid_pinpoints", "num_reward_heads", "process_image_mode"),
        *("vision_feature_layer", "vision_feature_select_strategy", "merged_hidden_size"),
    ),
)
FAMILIES = (
    TEXT,
    inside(
        replace(TEXT, pieces=pieces),
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        BESIDE,
        {"": "language_model."},
        left_out=(
            r"(model\.)?vision_tower\..*",
            r"(model\.)?multi_modal_projector\..*",
            r"patch_merge_mlp\..*",
            r"(.*\.)?mtp\..*",
        ),
    ),
)
