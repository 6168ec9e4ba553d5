"""GLM-5.3-Flash, its language model: Kimi Delta Attention, sparse attention over pooled keys, four streams.

The tower for images and the MTP layer behind the last are left out of what is read, and
loading says so. transformers has the language model with a head only inside the whole model.
"""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.families.kimi_linear import kda_of, kda_pieces, read_kda
from model.hf.family import Family, Nested, inside
from model.hf.fields import Fields, shown
from model.hf.latent import FFNS, indexer_types, latent_of, latent_pieces, mlp_layer_types
from model.hf.parts import (
    SIZES,
    Pairs,
    experts_apart,
    feed_forward,
    layer_types,
    layout_lines,
    mixers_of,
    plain_layer,
    skeleton,
)
from model.hf.pieces import Piece, rows, whole
from model.mixers.dsa import DsaConfig
from model.mixers.kda import KdaConfig

KINDS = {"linear_attention": "kda", "indexed_attention": "dsa_pooled"}
PAIRS: Pairs = SIZES | {
    "intermediate_size": "model.ffn_hidden",
    "swiglu_limit": ("model.activation.limit", 10.0),
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "hc_mult": ("residual.streams", 4),
    "hc_eps": ("residual.hyper_eps", 1e-6),
    "hc_sinkhorn_iters": ("residual.iterations", 20),
    "num_attention_heads": "mixer.dsa_pooled.num_heads",
    "q_lora_rank": "mixer.dsa_pooled.query_latent_dim",
    "kv_lora_rank": "mixer.dsa_pooled.latent_dim",
    "qk_nope_head_dim": "mixer.dsa_pooled.key_dim",
    "v_head_dim": "mixer.dsa_pooled.value_dim",
    "index_topk": "mixer.dsa_pooled.top_k",
    "index_n_heads": "mixer.dsa_pooled.index_heads",
    "index_head_dim": "mixer.dsa_pooled.index_dim",
    "index_kpool": ("mixer.dsa_pooled.index_pool", 16),
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden",
    "routed_scaling_factor": "moe.weight_scale",
    "norm_topk_prob": ("moe.has_normalized_weights", True),
    "n_group": ("moe.num_groups", 1),
    "topk_group": ("moe.kept_groups", 1),
}
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "qk_rope_head_dim": (0,),
    "index_kpool_always_select_tail": (True,),
}
FIXED = (
    *("residual=hyper", "residual.has_zero_centered_norm=false", "residual.has_learned_collapse=false"),
    *("moe=sigmoid", "moe.has_shared_gate=false", "mixer.dsa_pooled.latent_eps=${residual.norm_eps}"),
)
# Nothing is rotated, and multi-token prediction is not built; the loss coefficient is of training.
UNUSED = (
    *("head_dim", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("num_nextn_predict_layers", "router_aux_loss_coef"),
)


def read_more(fields: Fields) -> list[str]:
    """Layouts, linear attention and the shared expert."""
    for name in UNUSED:
        fields.take(name, None)
    depth = fields.take("num_hidden_layers")
    fields.expect("num_key_value_heads", fields.take("num_attention_heads"), None)
    fields.expect("qk_head_dim", fields.take("qk_nope_head_dim"), None)
    if fields.take("index_kpool", 16) < 2:
        raise CheckpointError("index_kpool is 1; built are pools of several keys")
    every = ["linear_attention" if index % 4 != 3 else "indexed_attention" for index in range(depth)]
    mixers = mixers_of(fields, every, KINDS | {"full_attention": "dsa_pooled"})
    indexers = indexer_types(fields, depth)
    if "shared" in [kind for kind, mixer in zip(indexers, mixers, strict=True) if mixer == "dsa_pooled"]:
        raise CheckpointError("indexer_types shares a choice of keys; built are layers that all choose")
    leading = fields.take("first_k_dense_replace", 3)
    ffns = ["dense" if index < leading else "sparse" for index in range(depth)]
    ffns = fields.take("mlp_layer_types", None) or ffns
    shared = fields.take("n_shared_experts", 1) * fields.take("moe_intermediate_size")
    linear = fields.node("linear_attn_config")
    found = [*read_kda(fields, linear, 64), *read_bound(fields, linear)]
    linear.finish()
    ffns = [FFNS.get(ffn, ffn) for ffn in ffns]
    return [*found, f"moe.shared_hidden={shared}", *layout_lines(mixers, ffns)]


def read_bound(fields: Fields, linear: Fields) -> list[str]:
    """The bound of the decay, or that there is none."""
    bound = linear.take("gate_lower_bound", fields.take("linear_lower_bound", -5.0))
    if linear.take("safe_gate", True) and bound is None and linear.take("head_dim", None) is not None:
        bound = -5.0
    if bound is None:
        return ["mixer.kda.decay=softplus"]
    return ["mixer.kda.decay=bounded_sigmoid", f"mixer.kda.decay_bound={shown(float(bound))}"]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layouts, linear attention and the shared expert. Raises CheckpointError where there is none."""
    kda, moe = kda_of(config), config.moe
    if not moe.shared_hidden:
        raise CheckpointError("moe.shared_hidden is 0; the architecture has a shared expert")
    if config.model.activation.limit is None:
        raise CheckpointError("model.activation.limit is null; the architecture has one")
    return {
        "num_key_value_heads": latent_of(config, "dsa_pooled").num_heads,
        "n_shared_experts": moe.shared_hidden // moe.hidden,
        "layer_types": layer_types(config, KINDS),
        "mlp_layer_types": mlp_layer_types(config),
        "indexer_types": ["full"] * config.model.depth,
        "linear_head_dim": kda.key_dim,
        "linear_num_heads": kda.num_heads,
        "linear_conv_kernel_dim": kda.conv_width,
        "linear_lower_bound": kda.decay_bound if kda.decay == "bounded_sigmoid" else None,
        "router_aux_loss_coef": moe.balance_loss,
        # Left out it would be one that is out of range here.
        "pad_token_id": None,
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor of the language model stands."""
    yield from skeleton(config)
    moe = config.moe
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from plain_layer(index, layer)
        for half, name in (("mixer", "attn"), ("ffn", "ffn")):
            for mine, other in (("weight", "fn"), ("bias", "base"), ("scale", "scale")):
                yield Piece(f"{ours}{half}_residual.{mine}", f"{theirs}hc_{name}_{other}")
        mixer, attention = config.mixer[layer.mixer], f"{theirs}self_attn."
        if isinstance(mixer, KdaConfig):
            yield from kda_pieces(f"{ours}mixer.", attention, mixer, whole)
        else:
            assert isinstance(mixer, DsaConfig), f"{type(mixer)=}"
            yield from latent_pieces(f"{ours}mixer.", attention, mixer)
            yield from pool_pieces(f"{ours}mixer.", f"{attention}indexer.index_kpool_compress_", mixer)
        if layer.ffn == "dense":
            hidden = config.model.ffn_hidden
            yield from feed_forward(f"{ours}ffn.", f"{theirs}mlp.", hidden, config.model.activation)
            continue
        yield Piece(f"{ours}moe.router.weight", f"{theirs}mlp.gate.weight")
        yield Piece(f"{ours}moe.router.bias", f"{theirs}mlp.gate.e_score_correction_bias")
        yield from experts_apart(config, f"{ours}moe.experts.", f"{theirs}mlp.experts.")
        shared, hidden = f"{theirs}mlp.shared_experts.", moe.shared_hidden
        yield from feed_forward(f"{ours}moe.shared.", shared, hidden, moe.shared_activation)


def pool_pieces(ours: str, theirs: str, dsa: DsaConfig) -> Iterator[Piece]:
    """How the keys of a pool are weighed: by position, and by a gate whose rows stand behind the others."""
    yield Piece(f"{ours}index_places", f"{theirs}ape")
    _, _, gate = rows(dsa.index_dim, dsa.index_heads, dsa.index_dim)
    yield Piece(f"{ours}index_proj.weight", f"{theirs}gate", gate)


TEXT = Family(
    "glm5_next_text",
    "Glm5NextTextModel",
    PAIRS,
    pieces,
    fixed=FIXED,
    expects=EXPECTS,
    read_more=read_more,
    write_more=write_more,
    aliases={"num_local_experts": "n_routed_experts"},
    float32=(r".*conv1d\.weight",),
)
FAMILIES = (
    inside(
        TEXT,
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        Nested(
            ("glm5_next_text",),
            silent=(
                *("vision_config", "image_token_id", "video_token_id"),
                *("image_start_token_id", "image_end_token_id"),
                *("video_start_token_id", "video_end_token_id"),
            ),
        ),
        {"": "", "model.": "model.language_model."},
        left_out=(r"model\.visual\..*", r"model\.language_model\.layers\.{beyond}\..*"),
    ),
)
