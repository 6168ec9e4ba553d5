"""Step-3.5-Flash: windows with more heads among full attention, a gate per head, clamped last experts."""

from collections.abc import Iterator, Sequence
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family, Nested, inside
from model.hf.fields import Fields
from model.hf.parts import (
    SIZES,
    WINDOWS,
    AttnNames,
    Pairs,
    attn_of,
    attn_pieces,
    feed_forward,
    layer_types,
    layout_lines,
    lines,
    plain_layer,
    rope_parameters,
    rotary_of,
    rotary_share,
    skeleton,
)
from model.hf.pieces import Piece
from model.shape import ActivationConfig

PAIRS: Pairs = SIZES | {
    "intermediate_size": ("model.ffn_hidden", 11264),
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "num_attention_heads": "mixer.attn.num_heads",
    "num_key_value_heads": "mixer.attn.num_key_heads",
    "head_dim": ("mixer.attn.head_dim", 128),
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": ("moe.hidden", 1280),
    "share_expert_dim": ("moe.shared_hidden", 1280),
    "moe_router_scaling_factor": ("moe.weight_scale", 1.0),
}
FIXED = (
    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=true"),
    *("mixer.attn.qk_norm=head", "mixer.attn.output_gate=head"),
)
# Fields of the published config that transformers drops stand in the second part.
EXPECTS = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
PUBLISHED = {
    "use_head_wise_attn_gate": (True,),
    "use_qk_norm": (True,),
    "zero_centered": (True,),
    "sink": (False,),
    "att_impl_type": ("GQA",),
    "use_moe": (True,),
    "use_moe_router_bias": (True,),
    "moe_router_activation": ("sigmoid",),
    "norm_expert_weight": (True,),
    "yarn_only_types": (["full_attention"],),
    "use_bidirectional_attention": (False, None),
    "gating": (True, "per-head"),
}
# Of MTP modules, which are left out; of layers by a step, which moe_layers_enum replaces.
UNREAD = (
    *("num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types", "max_seq_len"),
    *("need_fp32_gate", "moe_every_n_layer", "moe_layer_offset"),
)
ALIASES = {
    "num_attention_groups": "num_key_value_heads",
    "num_local_experts": "n_routed_experts",
    "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "share_expert_dims": "share_expert_dim",
    "num_mtp_layers": "num_nextn_predict_layers",
}


def read_more(fields: Fields) -> list[str]:
    """Layout, heads and rotary of both kinds of layers, and the clamps."""
    depth = fields.take("num_hidden_layers")
    for name, allowed in PUBLISHED.items():
        fields.expect(name, *allowed)
    for name in UNREAD:
        fields.take(name, None)
    fields.expect("query_pre_attn_scalar", None, fields.take("head_dim", 128))
    if not all(fields.take("use_rope_layers", None) or [True]):
        raise CheckpointError("use_rope_layers: layers without rotary are not built")
    kinds = by_layer(fields, "layer_types", depth) or ["full_attention"] * depth
    if unknown := sorted(set(kinds) - WINDOWS.keys()):
        raise CheckpointError(f"layer_types has {', '.join(unknown)}; built are {', '.join(WINDOWS)}")
    ffns = read_ffns(fields, depth)
    swa = {"num_heads": read_sliding_heads(fields, kinds), "window": fields.take("sliding_window", None)}
    moe = {
        "activation": read_clamp(fields, "swiglu_limits", ffns),
        "shared_activation": read_clamp(fields, "swiglu_limits_shared", ffns, covers_dense=True),
    }
    return [
        *lines({"mixer": {"swa": swa}, "moe": moe}),
        *read_rotary(fields, kinds),
        *layout_lines([WINDOWS[kind] for kind in kinds], ffns),
    ]


def by_layer(fields: Fields, name: str, depth: int) -> Any:
    """A list cut to the layers, as published ones go on with MTP modules; else the value."""
    values = fields.take(name, None)
    return values[:depth] if isinstance(values, list) else values


def read_ffns(fields: Fields, depth: int) -> list[str]:
    """Feed-forwards by layer; the first three are dense where the config does not say."""
    listed = fields.take("moe_layers_enum", None)
    if isinstance(listed, str):
        listed = [int(layer) for layer in listed.split(",") if layer.strip()]
    chosen = range(3, depth) if listed is None else listed
    every = ["sparse" if layer in chosen else "dense" for layer in range(depth)]
    kinds = by_layer(fields, "mlp_layer_types", depth) or every
    return [{"sparse": "moe"}.get(kind, kind) for kind in kinds]


def read_sliding_heads(fields: Fields, kinds: Sequence[str]) -> int:
    """Query heads of the layers with a window. Raises CheckpointError for fields that differ."""
    heads = fields.take("num_attention_heads")
    other = fields.node("attention_other_setting")
    other.expect("attention_type", "sliding_attention")
    other.expect("num_attention_groups", fields.take("num_key_value_heads"))
    for name in ("head_dim", "true_head_dim"):
        other.expect(name, fields.take("head_dim", 128))
    found = fields.take("num_sliding_attention_heads", None) or other.take("num_attention_heads", heads)
    other.expect("num_attention_heads", found)
    other.finish()
    each = {"num_attention_heads": found}
    sliding = {str(layer): each for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    # transformers leaves out what is the same in all layers.
    fields.expect("per_layer_config", sliding, None, *([{}] if found == heads else []))
    return found


def read_clamp(
    fields: Fields, name: str, ffns: Sequence[str], *, covers_dense: bool = False
) -> dict[str, Any]:
    """The activation of experts: one limit from some layer on, or none.

    covers_dense: dense layers would take it too. Raises CheckpointError for limits of another form.
    """
    limits: list[Any] = by_layer(fields, name, len(ffns)) or [None] * len(ffns)
    layers = [layer for layer, ffn in enumerate(ffns) if ffn == "moe"]
    clamped = [layer for layer in layers if limits[layer]]
    tail = layers[len(layers) - len(clamped) :]
    dense = covers_dense and any(limits[layer] for layer, ffn in enumerate(ffns) if ffn == "dense")
    if dense or clamped != tail or len({limits[layer] for layer in clamped}) > 1:
        raise CheckpointError(f"{name} is {limits}; built is one limit, from some layer with experts on")
    start = 0 if not clamped or clamped == layers else clamped[0]
    limit = float(limits[clamped[0]]) if clamped else None
    return {"kind": "swiglu", "limit": limit, "clamps_product": limit is not None, "limit_from": start}


def read_rotary(fields: Fields, kinds: Sequence[str]) -> list[str]:
    """Overrides for the rotary fields of each kind of layers that there is."""
    depth, head_dim = len(kinds), fields.take("head_dim", 128)
    nested = fields.take("rope_parameters", None) or {}
    thetas, shares = by_layer(fields, "rope_theta", depth), by_layer(fields, "partial_rotary_factors", depth)
    thetas = thetas if isinstance(thetas, list) else [1e4 if thetas is None else thetas] * depth
    scaling = fields.take("rope_scaling", None) or {}
    found = []
    for kind in sorted(set(kinds)):
        layers = [layer for layer, other in enumerate(kinds) if other == kind]
        ropes = [
            {"rope_theta": thetas[layer], "partial_rotary_factor": shares[layer] if shares else 1.0}
            for layer in layers
        ]
        rope = ropes[0] | (scaling if kind == "full_attention" else {})
        if any(other != ropes[0] for other in ropes) or (nested and not isinstance(nested.get(kind), dict)):
            raise CheckpointError(f"rope_parameters or rope_theta: not one rotary for all of {kind}")
        rope = nested.get(kind, rope)
        found.append(
            f"mixer.{WINDOWS[kind]}.rotary_dim={int(head_dim * rope.get('partial_rotary_factor', 1.0))}"
        )
        found += rotary_of(rope, WINDOWS[kind])
    return found


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout, heads and rotary of both kinds of layers, and the clamps."""
    kinds, swa, ropes = layer_types(config), attn_of(config, "swa"), {}
    for kind in sorted(set(kinds)):
        attn = attn_of(config, WINDOWS[kind])
        share = rotary_share(attn.rotary_dim, attn.head_dim)
        ropes[kind] = rope_parameters(attn.rotary_theta, attn.rotary_scaling, partial_rotary_factor=share)
    return {
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if layer.ffn == "moe" else layer.ffn for layer in config.layers],
        "num_sliding_attention_heads": swa.num_heads,
        "sliding_window": swa.window,
        "rope_parameters": ropes,
        "swiglu_limits": write_clamp(config, config.moe.activation),
        "swiglu_limits_shared": write_clamp(config, config.moe.shared_activation),
        # transformers takes no null here.
        "pad_token_id": 1,
    }


def write_clamp(config: Architecture, activation: ActivationConfig) -> list[float]:
    """The limit of each layer with experts; 0 is none."""
    limits = [activation.limit_at(layer) or 0.0 for layer in range(config.model.depth)]
    return [limit * (layer.ffn == "moe") for limit, layer in zip(limits, config.layers, strict=True)]


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    moe, hidden = config.moe, config.moe.hidden
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        yield from plain_layer(index, layer)
        attn = attn_of(config, layer.mixer)
        yield from attn_pieces(f"{ours}mixer.", f"{theirs}self_attn.", attn, AttnNames())
        if layer.ffn == "dense":
            dense = config.model.ffn_hidden
            yield from feed_forward(f"{ours}ffn.", f"{theirs}mlp.", dense, config.model.activation)
            continue
        ours, mixture = f"{ours}moe.", f"{theirs}moe."
        yield Piece(f"{ours}router.weight", f"{mixture}gate.weight")
        yield Piece(f"{ours}router.bias", f"{mixture}router_bias")
        yield Piece(f"{ours}experts.gate_up", f"{mixture}gate_proj.weight", lambda x: x[:, :hidden])
        yield Piece(f"{ours}experts.gate_up", f"{mixture}up_proj.weight", lambda x: x[:, hidden:])
        yield Piece(f"{ours}experts.down", f"{mixture}down_proj.weight")
        shared, activation = f"{theirs}share_expert.", moe.shared_activation
        yield from feed_forward(f"{ours}shared.", shared, moe.shared_hidden, activation)


MTP_TENSORS = r"model\.layers\.{beyond}\..*"
TEXT = Family(
    "step3p5",
    "Step3p5ForCausalLM",
    PAIRS,
    pieces,
    fixed=FIXED,
    expects=EXPECTS,
    read_more=read_more,
    write_more=write_more,
    aliases=ALIASES,
    left_out=(MTP_TENSORS,),
)
VISION = (r"(model\.)?vision_model\..*", r"vit_large_projector\..*", r"model\.multi_modal_projector\..*")
BESIDE = Nested(
    ("step3p5",),
    silent=(
        *("vision_config", "image_token_id", "projector_bias", "im_end_token", "im_patch_token"),
        *("im_start_token", "image_token_len", "patch_token_len", "understand_projector_stride"),
        *("use_im_start_end", "vision_select_layer"),
    ),
)
FAMILIES = (
    TEXT,
    inside(
        TEXT,
        "step3p7",
        "Step3p7ForConditionalGeneration",
        BESIDE,
        {"": ""},
        left_out=(MTP_TENSORS, *VISION),
    ),
)
