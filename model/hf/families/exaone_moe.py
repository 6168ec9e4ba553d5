"""K-EXAONE: windows with rotary and full attention without positions, sigmoid experts with a shared one."""

from typing import Any

from model.config import Architecture
from model.hf.families.glm4_moe import DENSE, EXPECTS, FIXED, PAIRS, leading_dense, shared_lines, without
from model.hf.families.gqa import ExpertNames, head_dim_of, moe_family
from model.hf.family import Family
from model.hf.fields import Fields, shown
from model.hf.latent import FFNS, mlp_layer_types
from model.hf.parts import (
    attn_of,
    layer_types,
    layout_lines,
    lines,
    mixers_of,
    rope_parameters,
    rotary_lines,
)

NAMES = ExpertNames("mlp.gate", "mlp.experts", bias="mlp.e_score_correction_bias")
# With a window in some layers those without one have no positions.
WINDOWED = {"sliding_attention": "swa", "full_attention": "nope"}
NOPE = {"mixer": {"nope": {"qk_norm": "head", "temperature": 0.0}}}


def read_more(fields: Fields) -> list[str]:
    """Layout, windows and rotary."""
    depth, dim = fields.take("num_hidden_layers"), head_dim_of(fields)
    window, period = fields.take("sliding_window", 4096), fields.take("sliding_window_pattern", 4)
    if not isinstance(window, int):
        # Without a window all layers would rotate, which transformers says and does not open.
        raise TypeError(f"sliding_window is {window!r}")
    every = [("full", "sliding")[(i + 1) % period != 0] + "_attention" for i in range(depth)]
    mixers = mixers_of(fields, every, WINDOWED)
    leading = leading_dense(fields, 1)
    kinds: list[str] | None = fields.take("mlp_layer_types", None)
    ffns = leading if kinds is None else [FFNS.get(kind, kind) for kind in kinds]
    return [
        *shared_lines(fields, "num_shared_experts", 1),
        *(f"mixer.attn.{name}={dim}" for name in ("head_dim", "rotary_dim")),
        f"mixer.swa.window={shown(window)}",
        *lines(NOPE),
        *rotary_lines(fields, "attn", 10000.0),
        *layout_lines(mixers, ffns),
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """What `read_more` reads."""
    kinds = layer_types(config, WINDOWED)
    attn = attn_of(config, "swa")
    return {
        "head_dim": attn.head_dim,
        "num_attention_heads": attn.num_heads,
        "num_key_value_heads": attn.num_key_heads,
        "rope_parameters": rope_parameters(attn.rotary_theta, attn.rotary_scaling),
        "layer_types": kinds,
        "sliding_window": attn.window,
        "mlp_layer_types": mlp_layer_types(config),
        "num_shared_experts": config.moe.shared_hidden // config.moe.hidden,
    }


FAMILIES = (
    Family(
        "exaone_moe",
        "ExaoneMoeForCausalLM",
        without(PAIRS, "n_routed_experts", "attention_bias")
        | DENSE
        | {
            "num_experts": "moe.num_experts",
            "routed_scaling_factor": ("moe.weight_scale", 2.5),
        },
        moe_family(NAMES),
        fixed=(*FIXED, "mixer.attn.qk_norm=head"),
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        aliases={"num_local_experts": "num_experts"},
        left_out=(r"mtp\..*",),
    ),
)
