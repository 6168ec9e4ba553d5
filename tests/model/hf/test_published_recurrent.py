"""Published systems with recurrent mixers: configs translate both ways, and every tensor has a place."""

from typing import Any

import pytest
import torch

from conf.compose import compose
from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import families
from model.hf.fields import Fields
from model.hf.pieces import Mapped
from model.hf.pretrained import difference, family_for, state_of, used
from model.language_model import LanguageModel

SYSTEMS = {
    "qwen3_next_80b_a3b": "qwen3_next",
    "qwen3_5_35b_a3b": "qwen3_5_moe_text",
    "qwen3_5_397b_a17b": "qwen3_5_moe",
    "kimi_linear_48b_a3b": "kimi_linear",
    "minimax_text_01": "minimax",
    "nemotron_3_nano": "nemotron_h",
    "jamba_1_5_large": "jamba",
    "glm_5_3_flash": "glm5_next",
}
# Names that the checkpoints have on the hub.
NAMES = {
    "qwen3_next_80b_a3b": ("model.layers.0.linear_attn.in_proj_qkvz.weight",),
    "qwen3_5_35b_a3b": ("model.layers.0.linear_attn.in_proj_qkv.weight",),
    "qwen3_5_397b_a17b": (
        "model.language_model.layers.3.self_attn.q_norm.weight",
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "lm_head.weight",
    ),
    "kimi_linear_48b_a3b": (
        "model.layers.0.self_attn.k_conv1d.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.block_sparse_moe.experts.15.w3.weight",
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
    ),
    "minimax_text_01": (
        "model.layers.0.self_attn.output_gate.weight",
        "model.layers.7.block_sparse_moe.experts.0.w2.weight",
    ),
    "nemotron_3_nano": ("backbone.layers.0.mixer.A_log", "backbone.layers.1.mixer.experts.0.up_proj.weight"),
    "jamba_1_5_large": (
        "model.layers.0.mamba.dt_layernorm.weight",
        "model.layers.1.feed_forward.router.weight",
    ),
    "glm_5_3_flash": (
        "model.language_model.layers.0.hc_attn_fn",
        "model.language_model.layers.0.self_attn.A_log",
        "model.language_model.layers.3.self_attn.indexer.index_kpool_compress_ape",
    ),
}
QWEN: dict[str, Any] = {
    **{"attention_bias": False, "attention_dropout": 0.0, "head_dim": 256, "hidden_act": "silu"},
    **{"hidden_size": 2048, "initializer_range": 0.02, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
    **{"linear_value_head_dim": 128, "max_position_embeddings": 262144, "moe_intermediate_size": 512},
    **{"num_attention_heads": 16, "num_key_value_heads": 2, "output_router_logits": False},
    **{"rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512},
    **{"full_attention_interval": 4, "use_cache": True},
}
# Configs as they stand on the hub, older spellings and fields without effect included.
HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next_80b_a3b": (
        "qwen3_next",
        QWEN
        | {"num_hidden_layers": 48, "intermediate_size": 5120, "vocab_size": 151936, "num_experts": 512}
        | {"num_experts_per_tok": 10, "norm_topk_prob": True, "decoder_sparse_step": 1, "rope_scaling": None}
        | {"rope_theta": 10000000, "partial_rotary_factor": 0.25, "mlp_only_layers": [], "bos_token_id": 1}
        | {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False},
    ),
    "qwen3_5_35b_a3b": (
        "qwen3_5_moe",
        {
            "image_token_id": 248056,
            "vision_config": {"depth": 27, "hidden_size": 1152},
            "tie_word_embeddings": False,
            "text_config": QWEN
            | {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 40, "vocab_size": 248320}
            | {"num_experts": 256, "num_experts_per_tok": 8, "attn_output_gate": True}
            | {"mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "mlp_only_layers": []}
            | {
                "mtp_use_dedicated_embeddings": False,
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
            }
            | {
                "rope_parameters": {
                    "mrope_interleaved": True,
                    "mrope_section": [11, 11, 10],
                    "rope_theta": 10000000,
                }
                | {"rope_type": "default", "partial_rotary_factor": 0.25}
            },
        },
    ),
    "kimi_linear_48b_a3b": (
        "kimi_linear",
        {
            **{"first_k_dense_replace": 1, "head_dim": 72, "hidden_act": "silu", "hidden_size": 2304},
            **{"initializer_range": 0.02, "intermediate_size": 9216, "kv_lora_rank": 512},
            "linear_attn_config": {
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                "kda_layers": [n for n in range(1, 27) if n % 4],
                **{"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
            },
            **{"mla_use_nope": True, "model_max_length": 1048576, "moe_intermediate_size": 1024},
            **{"moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid"},
            **{"num_attention_heads": 32, "num_expert_group": 1, "num_experts": 256},
            **{"num_experts_per_token": 8, "num_hidden_layers": 27, "num_key_value_heads": 32},
            **{"num_nextn_predict_layers": 0, "num_shared_experts": 1, "q_lora_rank": None},
            **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_scaling": None},
            **{"rope_theta": 10000.0, "routed_scaling_factor": 2.446, "tie_word_embeddings": False},
            **{"topk_group": 1, "use_cache": True, "use_grouped_topk": True, "v_head_dim": 128},
            **{"vocab_size": 163840, "pad_token_id": 163839, "dtype": "bfloat16"},
        },
    ),
    "minimax_text_01": (
        "minimax_text_01",
        {
            **{"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 6144},
            **{"initializer_range": 0.02, "intermediate_size": 9216, "num_attention_heads": 64},
            **{"attn_type_list": ([0] * 7 + [1]) * 10, "num_experts_per_tok": 2, "num_hidden_layers": 80},
            **{f"layernorm_{kind}_alpha": 3.5565588200778455 for kind in ("full_attention", "mlp")},
            **{f"layernorm_{kind}_beta": 1.0 for kind in ("full_attention", "linear_attention", "mlp")},
            "layernorm_linear_attention_alpha": 3.5565588200778455,
            **{"num_key_value_heads": 8, "num_local_experts": 32, "postnorm": True, "rms_norm_eps": 1e-5},
            **{"rope_theta": 10000000, "rotary_dim": 64, "router_aux_loss_coef": 0.001},
            **{"router_jitter_noise": 0.0, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid"},
            **{"sliding_window": None, "tie_word_embeddings": False, "use_cache": True},
            "vocab_size": 200064,
        },
    ),
    "nemotron_3_nano": (
        "nemotron_h",
        {
            **{"attention_bias": False, "attention_dropout": 0.0, "chunk_size": 128, "conv_kernel": 4},
            **{"expand": 2, "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 2688},
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            **{"initializer_range": 0.02, "intermediate_size": 1856, "layer_norm_epsilon": 1e-5},
            **{"mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64},
            **{"mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "mlp_bias": False},
            **{"mlp_hidden_act": "relu2", "moe_intermediate_size": 1856, "n_group": 1, "n_groups": 8},
            **{"moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 128, "norm_eps": 1e-5},
            **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 32},
            **{"num_experts_per_tok": 6, "num_hidden_layers": 52, "num_key_value_heads": 2},
            **{"num_logits_to_keep": 1, "partial_rotary_factor": 1.0, "rescale_prenorm_residual": True},
            **{"residual_in_fp32": False, "rope_theta": 10000, "routed_scaling_factor": 2.5},
            **{"sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False},
            **{"time_step_floor": 0.0001, "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1},
            **{"time_step_min": 0.001, "topk_group": 1, "use_bias": False, "use_conv_bias": True},
            **{"use_mamba_kernels": True, "vocab_size": 131072},
        },
    ),
    "jamba_1_5_large": (
        "jamba",
        {
            **{"attention_dropout": 0.0, "attn_layer_offset": 4, "attn_layer_period": 8},
            **{"expert_layer_offset": 1, "expert_layer_period": 2, "hidden_act": "silu"},
            **{"hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 24576},
            **{"mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_dt_rank": 512},
            **{"mamba_expand": 2, "mamba_proj_bias": False, "num_attention_heads": 64, "num_experts": 16},
            **{"num_experts_per_tok": 2, "num_hidden_layers": 72, "num_key_value_heads": 8},
            **{"num_logits_to_keep": 1, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001},
            **{"sliding_window": None, "tie_word_embeddings": False, "use_mamba_kernels": True},
            "vocab_size": 65536,
        },
    ),
}


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_published_system_has_a_place_for_everything(system: str) -> None:
    config = compose([f"model={system}"], Architecture)
    family, written = family_for(config, SYSTEMS[system])
    fields = Fields(written, system, family.aliases)
    assert used(compose(family.read(fields), Architecture)) == used(config)
    fields.finish()
    # All kinds of layers are among the first eight, and experts are alike.
    small = compose([f"model={system}", "model.depth=8", "moe.num_experts=16"], Architecture)
    with torch.device("meta"):
        model = LanguageModel(small)
    mapped = Mapped(family.pieces(small), state_of(model))
    has_bias = small.moe.score == "sigmoid"
    assert all(name.endswith("router.bias") and not has_bias for name in mapped.uncovered)
    assert mapped.by_theirs.keys() >= set(NAMES[system])


@pytest.mark.parametrize("system", sorted(HUB))
def test_config_of_the_hub_is_the_published_system(system: str) -> None:
    model_type, values = HUB[system]
    family = families()[model_type]
    fields = Fields(values, system, family.aliases)
    found = used(compose(family.read(fields), Architecture))
    fields.finish()
    expected = used(compose([f"model={system}"], Architecture))
    found["model"].pop("mtp", None)
    expected["model"].pop("mtp", None)
    assert not difference(expected, found)


REFUSED = [
    ("minimax_text_01", {"layernorm_mlp_alpha": 1.0}, "full_attn_alpha_factor"),
    ("minimax_text_01", {"shared_intermediate_size": 8}, "shared_intermediate_size"),
    ("kimi_linear_48b_a3b", {"mla_use_nope": False}, "mla_use_nope"),
    ("kimi_linear_48b_a3b", {"linear_attn_config": {"full_attn_layers": [1]}}, "layer_types"),
    ("nemotron_3_nano", {"hybrid_override_pattern": "MX"}, "layers_block_type has X"),
    ("nemotron_3_nano", {"moe_latent_size": 8}, "moe_latent_size"),
    ("nemotron_3_nano", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("jamba_1_5_large", {"mamba_proj_bias": True}, "mamba_proj_bias"),
    ("qwen3_next_80b_a3b", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
]


@pytest.mark.parametrize(("system", "changes", "field"), REFUSED)
def test_what_is_not_built_is_refused_by_name(system: str, changes: dict[str, Any], field: str) -> None:
    model_type, values = HUB[system]
    family = families()[model_type]
    with pytest.raises(CheckpointError, match=field):
        family.read(Fields(values | changes, system, family.aliases))
