"""Kimi-Linear: Kimi Delta Attention and latent attention without positions, sigmoid experts.

transformers writes the dense layers under the names of the experts' block; both are read.
"""

from collections.abc import Iterator
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.latent import FFNS, latent_of, latent_pieces, mlp_layer_types
from model.hf.parts import (
    SIZES,
    Pairs,
    experts_apart,
    feed_forward,
    joined_rows,
    layout_lines,
    plain_layer,
    skeleton,
)
from model.hf.pieces import Piece, TensorView, rows
from model.mixers.kda import KdaConfig

KINDS = {"linear_attention": "kda", "full_attention": "mla"}
W_NAMES = ("w1.weight", "w3.weight", "w2.weight")
PAIRS: Pairs = SIZES | {
    "intermediate_size": "model.ffn_hidden",
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.mla.num_heads",
    "q_lora_rank": ("mixer.mla.query_latent_dim", None),
    "kv_lora_rank": "mixer.mla.latent_dim",
    "qk_nope_head_dim": "mixer.mla.key_dim",
    "qk_rope_head_dim": "mixer.mla.shared_key_dim",
    "v_head_dim": "mixer.mla.value_dim",
    "num_experts": "moe.num_experts",
    "num_experts_per_token": "moe.top_k",
    "moe_intermediate_size": "moe.hidden",
    "routed_scaling_factor": "moe.weight_scale",
    "moe_renormalize": ("moe.has_normalized_weights", True),
    "num_expert_group": ("moe.num_groups", 1),
    "topk_group": ("moe.kept_groups", 1),
}
ALIASES = {
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "n_shared_experts": "num_shared_experts",
    "model_max_length": "max_position_embeddings",
}
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "moe_layer_freq": (1,),
    "moe_router_activation_func": ("sigmoid",),
    "use_grouped_topk": (True,),
    "mla_use_nope": (True,),
    "num_nextn_predict_layers": (0,),
}
FIXED = (
    *("residual=pre_norm", "residual.has_zero_centered_norm=false", "moe=sigmoid"),
    *("moe.has_shared_gate=false", "mixer.kda.decay=softplus"),
    # The norms of the latents have an eps of their own, whatever rms_norm_eps says.
    *("mixer.mla.rotary_dim=0", "mixer.mla.latent_eps=1e-6"),
)


def read_more(fields: Fields) -> list[str]:
    """Layouts, linear attention and the shared expert."""
    depth = fields.take("num_hidden_layers")
    fields.require("num_key_value_heads", fields.take("num_attention_heads"), None)
    fields.expect("rope_scaling", None)
    # Nothing is rotated; these follow from the other dims of a head.
    for name in ("head_dim", "qk_head_dim"):
        fields.take(name, None)
    rope, linear = fields.node("rope_parameters"), fields.node("linear_attn_config")
    rope.expect("rope_type", "default")
    theta = rope.take("rope_theta", fields.take("rope_theta", 10000.0))
    rope.finish()
    full, delta = linear.take("full_attn_layers", None), linear.take("kda_layers", None)
    kinds = fields.take("layer_types", None)
    if kinds is None and full is not None and sorted([*full, *(delta or [])]) == list(range(1, depth + 1)):
        kinds = ["full_attention" if index + 1 in full else "linear_attention" for index in range(depth)]
    kinds = kinds or fields.take("layer_types")
    leading = fields.take("first_k_dense_replace", 1)
    ffns = ["dense" if index < leading else "sparse" for index in range(depth)]
    ffns = fields.take("mlp_layer_types", None) or ffns
    shared = fields.take("num_shared_experts", 1)
    found = read_kda(fields, linear, 32)
    linear.finish()
    return [
        *found,
        f"mixer.mla.rotary_theta={float(theta)}",
        f"moe.shared_hidden={shared * fields.take('moe_intermediate_size')}",
        *layout_lines([KINDS.get(kind, kind) for kind in kinds], [FFNS.get(ffn, ffn) for ffn in ffns]),
    ]


def read_kda(fields: Fields, linear: Fields, default_heads: int) -> list[str]:
    """Sizes of the linear attention, in a node of their own or beside the others: all dims are one."""
    dim = linear.take("head_dim", fields.take("linear_head_dim", 128))
    heads = linear.take("num_heads", fields.take("linear_num_heads", default_heads))
    taps = linear.take("short_conv_kernel_size", fields.take("linear_conv_kernel_dim", 4))
    names = ("key_dim", "value_dim", "decay_rank", "gate_rank")
    found = [f"mixer.kda.{name}={dim}" for name in names]
    return [*found, f"mixer.kda.num_heads={heads}", f"mixer.kda.conv_width={taps}"]


def kda_of(config: Architecture) -> KdaConfig:
    """The linear attention. Raises CheckpointError without it."""
    found = config.mixer.get("kda")
    if not isinstance(found, KdaConfig):
        raise CheckpointError("mixer.kda is not Kimi Delta Attention")
    return found


def write_more(config: Architecture) -> dict[str, Any]:
    """Layouts, linear attention and the shared expert. Raises CheckpointError where there is none."""
    kda, moe, mixers = kda_of(config), config.moe, [layer.mixer for layer in config.layers]
    if not moe.shared_hidden:
        raise CheckpointError("moe.shared_hidden is 0; the architecture has a shared expert")
    ffns = mlp_layer_types(config)
    return {
        "num_key_value_heads": latent_of(config, "mla").num_heads,
        "rope_theta": latent_of(config, "mla").rotary_theta,
        "num_shared_experts": moe.shared_hidden // moe.hidden,
        "first_k_dense_replace": next((i for i, ffn in enumerate(ffns) if ffn != "dense"), len(ffns)),
        "mlp_layer_types": ffns,
        "linear_attn_config": {
            "full_attn_layers": [index + 1 for index, mixer in enumerate(mixers) if mixer == "mla"],
            "kda_layers": [index + 1 for index, mixer in enumerate(mixers) if mixer == "kda"],
            "head_dim": kda.key_dim,
            "num_heads": kda.num_heads,
            "short_conv_kernel_size": kda.conv_width,
        },
    }


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    moe = config.moe
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from plain_layer(index, layer)
        mixer, attention = config.mixer[layer.mixer], f"{theirs}self_attn."
        if isinstance(mixer, KdaConfig):
            yield from kda_pieces(f"{ours}mixer.", attention, mixer, lambda x: x[None, None, :, None])
        else:
            latent = latent_of(config, layer.mixer)
            yield from latent_pieces(f"{ours}mixer.", attention, latent)
        if layer.ffn == "dense":
            yield from dense_pieces(config, index, "mlp")
            continue
        block = f"{theirs}block_sparse_moe."
        yield Piece(f"{ours}moe.router.weight", f"{block}gate.weight")
        yield Piece(f"{ours}moe.router.bias", f"{block}gate.e_score_correction_bias")
        yield from experts_apart(config, f"{ours}moe.experts.", f"{block}experts.", W_NAMES)
        shared, hidden = f"{block}shared_experts.", moe.shared_hidden
        yield from feed_forward(f"{ours}moe.shared.", shared, hidden, moe.shared_activation)


def dense_pieces(config: Architecture, index: int, name: str) -> Iterator[Piece]:
    """The dense feed-forward of a layer."""
    shape, theirs = config.model, f"model.layers.{index}.{name}."
    yield from feed_forward(f"blocks.{index}.ffn.", theirs, shape.ffn_hidden, shape.activation)


def dense_as_saved(config: Architecture) -> Iterator[Piece]:
    """Dense feed-forwards as transformers names them."""
    for index, layer in enumerate(config.layers):
        if layer.ffn == "dense":
            yield from dense_pieces(config, index, "block_sparse_moe")


def kda_pieces(ours: str, theirs: str, kda: KdaConfig, rates: TensorView) -> Iterator[Piece]:
    """Projections and convolutions one by one; `rates` gives the rates the shape that theirs have."""
    keys, values = kda.num_heads * kda.key_dim, kda.num_heads * kda.value_dim
    sizes = {"q": keys, "k": keys, "v": values}
    parts = {f"{theirs}{name}_proj.weight": size for name, size in (sizes | {"b": kda.num_heads}).items()}
    yield from joined_rows(f"{ours}in_proj.weight", parts)
    for name, view in zip(sizes, rows(*sizes.values()), strict=True):
        yield Piece(f"{ours}conv.weight", f"{theirs}{name}_conv1d.weight", _with_channel(view))
    for mine, name in (("decay", "f"), ("gate", "g")):
        yield Piece(f"{ours}{mine}_down_proj.weight", f"{theirs}{name}_a_proj.weight")
        yield Piece(f"{ours}{mine}_up_proj.weight", f"{theirs}{name}_b_proj.weight")
    yield Piece(f"{ours}decay.A_log", f"{theirs}A_log", rates)
    yield Piece(f"{ours}decay.dt_bias", f"{theirs}dt_bias")
    yield Piece(f"{ours}out_norm.weight", f"{theirs}o_norm.weight")
    yield Piece(f"{ours}out_proj.weight", f"{theirs}o_proj.weight")


def _with_channel(view: TensorView) -> TensorView:
    return lambda x: view(x)[:, None]


FAMILIES = (
    Family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        PAIRS,
        pieces,
        fixed=FIXED,
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        aliases=ALIASES,
        instead=(dense_as_saved,),
    ),
)
