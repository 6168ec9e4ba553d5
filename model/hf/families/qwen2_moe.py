"""Qwen1.5-MoE and Qwen2-MoE: attention with biases over softmax experts, a shared expert with a gate."""

from typing import Any

from model.config import Architecture
from model.hf.families.gqa import (
    EXPECTS,
    EXPERTS,
    HEADS,
    ExpertNames,
    full_rotary,
    moe_family,
    write_qwen3_moe,
)
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.parts import layout_lines, mixers_of

NAMES = ExpertNames("mlp.gate", "mlp.experts", shared="mlp.shared_expert.")


def read_more(fields: Fields) -> list[str]:
    """Layers that are dense by position; no windows, which no published model has."""
    depth, dense = fields.take("num_hidden_layers"), fields.take("mlp_only_layers", None) or []
    sparse_step = fields.take("decoder_sparse_step", 1)
    ffns = ["dense" if i in dense or (i + 1) % sparse_step else "moe" for i in range(depth)]
    fields.expect("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers"):
        fields.take(name, None)
    mixers = mixers_of(fields, ["full_attention"] * depth, {"full_attention": "attn"})
    return [*full_rotary(10000.0)(fields), *layout_lines(mixers, ffns)]


def write_more(config: Architecture) -> dict[str, Any]:
    """What `read_more` reads."""
    return write_qwen3_moe(config) | {"use_sliding_window": False}


FAMILIES = (
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        HEADS
        | EXPERTS
        | {
            "num_experts": "moe.num_experts",
            "moe_intermediate_size": "moe.hidden",
            "shared_expert_intermediate_size": "moe.shared_hidden",
            "intermediate_size": "model.ffn_hidden",
            "rms_norm_eps": ("residual.norm_eps", 1e-6),
            "norm_topk_prob": ("moe.has_normalized_weights", False),
            "qkv_bias": ("mixer.attn.has_bias", True),
        },
        moe_family(NAMES),
        fixed=(
            *("moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
            *("moe.has_shared_gate=true", "mixer.attn.output_gate=none", "mixer.attn.qk_norm=none"),
            "mixer.attn.has_output_bias=false",
        ),
        expects=EXPECTS,
        read_more=read_more,
        write_more=write_more,
        aliases={"num_local_experts": "num_experts"},
    ),
)
