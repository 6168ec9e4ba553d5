"""Grouped-query attention over sigmoid experts with a shared one: GLM-4.5 to 4.7, dots1, Solar Open, Hy3."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.families.gqa import HEADS, ExpertNames, head_dim_of, layer_pieces, moe_family
from model.hf.family import Family, Nested, inside
from model.hf.fields import Fields, shown
from model.hf.latent import MTP_FIELDS, mlp_layer_types
from model.hf.parts import (
    Pairs,
    attn_of,
    layer_types,
    layout_lines,
    mixers_of,
    rope_of,
    rope_parameters,
    rotary_lines,
    rotary_of,
    rotary_share,
)
from model.hf.pieces import Piece
from model.layout import Layer

PAIRS: Pairs = HEADS | {
    "rms_norm_eps": ("residual.norm_eps", 1e-5),
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.hidden",
    "n_routed_experts": "moe.num_experts",
    "routed_scaling_factor": ("moe.weight_scale", 1.0),
    "n_group": ("moe.num_groups", 1),
    "topk_group": ("moe.kept_groups", 1),
    "norm_topk_prob": ("moe.has_normalized_weights", True),
    "attention_bias": ("mixer.attn.has_bias", False),
}
DENSE: Pairs = {"intermediate_size": "model.ffn_hidden"}
EXPECTS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}
METHOD: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
FIXED = (
    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("moe.has_shared_gate=false", "mixer.attn.output_gate=none"),
)
NAMES = ExpertNames("mlp.gate", "mlp.experts", bias="mlp.gate.e_score_correction_bias")
HY_NAMES = ExpertNames("mlp.router.gate", "mlp.experts", bias="mlp.expert_bias", shared="mlp.shared_mlp.")
GLM_PARTIAL = 0.5
# What stands in no layer of ours must fit too.
MTP = ("model.mtp.mixer=attn", "model.mtp.ffn=moe", "model.mtp.puts_hidden_first=false")


def shared_lines(fields: Fields, name: str, default: int | None) -> list[str]:
    """The shared experts, which are one. Raises CheckpointError without any."""
    shared = fields.take(name, default) or 0
    if shared < 1:
        raise CheckpointError(f"{name} is {shared}; these architectures have at least one")
    return [f"moe.shared_hidden={shared * fields.take('moe_intermediate_size')}"]


def leading_dense(fields: Fields, default: int) -> list[str]:
    """Feed-forwards of which the first are dense."""
    depth, leading = fields.take("num_hidden_layers"), fields.take("first_k_dense_replace", default)
    return ["dense" if layer < leading else "moe" for layer in range(depth)]


def partial_rotary(fields: Fields, default: float, theta: float) -> list[str]:
    """Head dim and rotary of heads that turn in part."""
    dim, rope = head_dim_of(fields), rope_of(fields, theta)
    share = rope.get("partial_rotary_factor", fields.take("partial_rotary_factor", default))
    rope.pop("mrope_section", None)
    rotary = f"mixer.attn.rotary_dim={int(dim * share)}"
    return [f"mixer.attn.head_dim={dim}", rotary, *rotary_of(rope, "attn")]


def read_glm(fields: Fields) -> list[str]:
    """Half of each head turned, first layers dense, a q/k norm where asked for, MTP modules."""
    ffns = leading_dense(fields, 1)
    return [
        *shared_lines(fields, "n_shared_experts", 1),
        *partial_rotary(fields, GLM_PARTIAL, 10000.0),
        f"mixer.attn.qk_norm={'head' if fields.take('use_qk_norm', False) else 'none'}",
        "mixer.attn.has_output_bias=false",
        *layout_lines(["attn"] * len(ffns), ffns),
        *MTP,
        f"model.mtp.depth={fields.take('num_nextn_predict_layers', 1) or 0}",
    ]


def write_base(config: Architecture, share: float | None = None) -> dict[str, Any]:
    """Head dim, rotary and the number of shared experts."""
    attn = attn_of(config)
    rope = {} if share is None else {"partial_rotary_factor": share}
    return {
        "head_dim": attn.head_dim,
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling, **rope),
        "n_shared_experts": config.moe.shared_hidden // config.moe.hidden,
    }


def leading_of(config: Architecture) -> int:
    """How many layers at the start are dense."""
    ffns = [layer.ffn for layer in config.layers]
    return next((index for index, ffn in enumerate(ffns) if ffn != "dense"), len(ffns))


def write_glm(config: Architecture) -> dict[str, Any]:
    """What `read_glm` reads."""
    attn = attn_of(config)
    return {
        **write_base(config, rotary_share(attn.rotary_dim, attn.head_dim)),
        "first_k_dense_replace": leading_of(config),
        "use_qk_norm": attn.qk_norm == "head",
        "num_nextn_predict_layers": config.model.mtp.depth,
    }


def read_glm_v(fields: Fields) -> list[str]:
    """The same without MTP modules, and no norm of queries and keys."""
    fields.expect("use_qk_norm", False)
    fields.take("router_aux_loss_coef", None)
    fields.take("num_nextn_predict_layers", None)
    return [*read_glm(fields), "model.mtp.depth=0"]


def write_glm_v(config: Architecture) -> dict[str, Any]:
    """What `read_glm_v` reads, with the sections of image positions."""
    found, half = write_glm(config), attn_of(config).rotary_dim // 2
    sections = [(half + 2) // 3, (half + 1) // 3, half // 3]
    found["rope_parameters"] |= {"mrope_section": sections}
    del found["num_nextn_predict_layers"]
    return found


def glm_pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands; MTP modules are further layers."""
    yield from moe_family(NAMES)(config)
    mtp = config.model.mtp
    names = {"embed_norm": "enorm", "hidden_norm": "hnorm", "in_proj": "eh_proj", "norm": "shared_head.norm"}
    for index in range(mtp.depth):
        ours, theirs = f"mtp.{index}.", f"model.layers.{config.model.depth + index}."
        for mine, name in names.items():
            yield Piece(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
        yield from layer_pieces(config, f"{ours}block.", theirs, Layer(mtp.mixer, mtp.ffn), NAMES)


def read_solar(fields: Fields) -> list[str]:
    """Whole heads turned, experts in every layer."""
    depth, dim = fields.take("num_hidden_layers"), fields.take("head_dim", 128)
    fields.expect("use_qk_norm", False)
    fields.expect("first_k_dense_replace", 0)
    for name in ("intermediate_size", "num_nextn_predict_layers"):
        fields.take(name, None)
    fields.expect("partial_rotary_factor", 1.0)
    return [
        *shared_lines(fields, "n_shared_experts", 1),
        f"mixer.attn.head_dim={dim}",
        f"mixer.attn.rotary_dim={dim}",
        *rotary_lines(fields, "attn", 1e6),
        *layout_lines(["attn"] * depth, ["moe"] * depth),
    ]


def read_dots(fields: Fields) -> list[str]:
    """Windows from a layer on, first layers dense."""
    ffns, window = leading_dense(fields, 0), fields.take("sliding_window", 4096)
    first = fields.take("max_window_layers", 62)
    every = [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in range(len(ffns))
    ]
    mixers, dim = mixers_of(fields, every), head_dim_of(fields)
    return [
        *shared_lines(fields, "n_shared_experts", None),
        f"mixer.attn.head_dim={dim}",
        f"mixer.attn.rotary_dim={dim}",
        f"mixer.attn.has_output_bias={shown(fields.take('attention_bias', False))}",
        f"mixer.swa.window={shown(window)}",
        *rotary_lines(fields, "attn", 10000.0),
        *layout_lines(mixers, ffns),
    ]


def write_dots(config: Architecture) -> dict[str, Any]:
    """What `read_dots` reads."""
    types = layer_types(config)
    window = attn_of(config, "swa").window if "sliding_attention" in types else None
    first = next((i for i, kind in enumerate(types) if kind == "sliding_attention"), len(types))
    return {
        **write_base(config),
        "first_k_dense_replace": leading_of(config),
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": types,
    }


def read_hy(fields: Fields) -> list[str]:
    """Dense layers from a list; the sum with the shared expert has no precision of its own."""
    depth, dim = fields.take("num_hidden_layers"), fields.take("head_dim", 128)
    fields.take("enable_moe_fp32_combine", None)
    kinds = fields.take("mlp_layer_types", None) or ["dense"] + ["sparse"] * (depth - 1)
    names = {"dense": "dense", "sparse": "moe"}
    if unknown := sorted(set(kinds) - names.keys()):
        raise CheckpointError(f"mlp_layer_types has {', '.join(unknown)}; built are {', '.join(names)}")
    return [
        *shared_lines(fields, "num_shared_experts", 1),
        f"mixer.attn.head_dim={dim}",
        f"mixer.attn.rotary_dim={dim}",
        f"mixer.attn.has_output_bias={shown(fields.take('attention_bias', False))}",
        *rotary_lines(fields, "attn", 11_158_840.0),
        *layout_lines(["attn"] * depth, [names[kind] for kind in kinds]),
    ]


def write_hy(config: Architecture) -> dict[str, Any]:
    """What `read_hy` reads."""
    found = write_base(config)
    return found | {
        "num_shared_experts": found.pop("n_shared_experts"),
        "mlp_layer_types": mlp_layer_types(config),
        "enable_moe_fp32_combine": False,
    }


def without(pairs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The pairs but those of these names."""
    return {name: value for name, value in pairs.items() if name not in names}


GLM = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    PAIRS | DENSE,
    glm_pieces,
    fixed=FIXED,
    expects=EXPECTS | METHOD,
    read_more=read_glm,
    write_more=write_glm,
    **MTP_FIELDS,
)
# The text model of GLM-4.5V, which has no class of its own; all three positions of a token are one in text.
GLM_V = inside(
    replace(
        GLM,
        pairs=PAIRS | DENSE | {"attention_bias": ("mixer.attn.has_bias", True)},
        pieces=moe_family(NAMES),
        read_more=read_glm_v,
        write_more=write_glm_v,
        ignored=(),
        mtp=None,
        copies=lambda _: {},
        aliases={"num_local_experts": "n_routed_experts"},
    ),
    "glm4v_moe",
    "Glm4vMoeForConditionalGeneration",
    Nested(
        ("glm4v_moe_text",),
        silent=(
            *("vision_config", "image_token_id", "video_token_id", "image_start_token_id"),
            *("image_end_token_id", "video_start_token_id", "video_end_token_id"),
        ),
        is_tied=None,
    ),
    {"": "", "model.": "model.language_model."},
    left_out=(r"model\.visual\..*", r"model\.language_model\.layers\.{beyond}\..*"),
)
FAMILIES = (
    GLM,
    GLM_V,
    Family(
        "solar_open",
        "SolarOpenForCausalLM",
        PAIRS,
        moe_family(NAMES),
        fixed=(*FIXED, "mixer.attn.qk_norm=none", "mixer.attn.has_output_bias=false"),
        expects=EXPECTS | METHOD,
        read_more=read_solar,
        write_more=write_base,
        aliases={"num_local_experts": "n_routed_experts"},
    ),
    Family(
        "dots1",
        "Dots1ForCausalLM",
        PAIRS
        | DENSE
        | {
            "rms_norm_eps": ("residual.norm_eps", 1e-6),
            "norm_topk_prob": ("moe.has_normalized_weights", False),
        },
        moe_family(NAMES),
        fixed=(*FIXED, "mixer.attn.qk_norm=head"),
        expects=EXPECTS | METHOD | {"moe_layer_freq": (1,)},
        read_more=read_dots,
        write_more=write_dots,
        aliases={"num_local_experts": "n_routed_experts"},
    ),
    Family(
        "hy_v3",
        "HYV3ForCausalLM",
        without(PAIRS, "n_routed_experts", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob")
        | DENSE
        | {
            "num_experts": "moe.num_experts",
            "router_scaling_factor": ("moe.weight_scale", 2.826),
            "initializer_range": ("model.init_std", 0.006),
        },
        moe_family(HY_NAMES),
        fixed=(
            *(*FIXED, "mixer.attn.qk_norm=head", "moe.num_groups=1", "moe.kept_groups=1"),
            "moe.has_normalized_weights=true",
        ),
        expects=EXPECTS | {"mlp_bias": (False,)},
        read_more=read_hy,
        write_more=write_hy,
        aliases={"num_local_experts": "num_experts"},
        left_out=(r"model\.layers\.{beyond}\..*",),
    ),
)
