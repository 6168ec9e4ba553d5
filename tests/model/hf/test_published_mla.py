"""Published systems of latent attention: their configs translate both ways, and every tensor has a name."""

import re
from typing import Any

import pytest
import torch

from conf.compose import compose
from conf.errors import CheckpointError, ConfigError
from model.config import Architecture
from model.hf.family import Family, families
from model.hf.fields import Fields
from model.hf.pieces import Mapped
from model.hf.pretrained import family_for, state_of, used
from model.language_model import LanguageModel

PUBLISHED = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v3_2": "deepseek_v32",
    "deepseek_v4_flash": "deepseek_v4",
    "deepseek_v4_pro": "deepseek_v4",
    "glm_4_7_flash": "glm4_moe_lite",
    "glm_5": "glm_moe_dsa",
    "kimi_k2": "kimi_k2",
    "kimi_k2_5": "kimi_k25",
    "longcat_flash": "longcat_flash",
    "mistral_large_3": "deepseek_v3",
}
# Names that the checkpoints have on the hub, by system.
NAMES = {
    "deepseek_v3": ("model.layers.6.eh_proj.weight", "model.layers.5.mlp.experts.7.up_proj.weight"),
    "deepseek_v3_2": ("model.layers.0.self_attn.indexer.weights_proj.weight",),
    "deepseek_v4_flash": ("layers.2.attn.indexer.compressor.ape", "layers.0.ffn.gate.tid2eid"),
    "glm_4_7_flash": ("model.layers.6.shared_head.norm.weight",),
    "kimi_k2_5": ("language_model.model.layers.1.mlp.gate.e_score_correction_bias",),
    "longcat_flash": ("model.layers.2.self_attn.1.kv_b_proj.weight",),
}


@pytest.mark.parametrize("system", sorted(PUBLISHED))
def test_config_translates_at_full_size(system: str) -> None:
    config = compose([f"model={system}"], Architecture)
    family, written = family_for(config, PUBLISHED[system])
    assert used(read(family, written)) == used(config)


@pytest.mark.parametrize("system", sorted(PUBLISHED))
def test_every_tensor_has_a_name(system: str) -> None:
    # Widths are the published ones; layers and experts repeat.
    cut = ("model.depth=6", "moe.num_experts=8", "moe.top_k=2", "moe.num_groups=1", "moe.kept_groups=1")
    config = compose([f"model={system}", *cut], Architecture)
    family, _ = family_for(config, PUBLISHED[system])
    with torch.device("meta"):
        ours = state_of(LanguageModel(config))
    mapped = Mapped(family.pieces(config), ours)
    assert all(name.endswith("router.bias") for name in mapped.uncovered)
    assert mapped.by_theirs.keys() >= set(NAMES.get(system, ()))
    pattern = (family.mtp or "").replace("{depth}", "6")
    mtp_names = {name for name in mapped.by_theirs if re.fullmatch(pattern, name)}
    assert bool(mtp_names) == bool(config.model.mtp.depth)


def read(family: Family, fields: dict[str, Any]) -> Architecture:
    found = Fields(fields, "config.json", family.aliases)
    overrides = family.read(found)
    found.finish()
    return compose(overrides, Architecture)


V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
OLDER = {
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v32": (
        "deepseek_v3_2",
        {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128},
    ),
    "kimi_k2": (
        "kimi_k2",
        {
            **{"num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163840, "n_group": 1},
            **{"topk_group": 1, "n_routed_experts": 384, "routed_scaling_factor": 2.827, "rope_theta": 5e4},
            **{"num_nextn_predict_layers": 0, "first_k_dense_replace": 1, "aux_loss_alpha": 0.001},
            "rope_scaling": V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **{"hidden_size": 5120, "num_hidden_layers": 60, "vocab_size": 102400, "topk_group": 3},
            **{"intermediate_size": 12288, "moe_intermediate_size": 1536, "n_shared_experts": 2},
            **{"n_routed_experts": 160, "num_experts_per_tok": 6, "routed_scaling_factor": 16.0},
            **{"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
            **{"first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
            "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
}


@pytest.mark.parametrize("model_type", sorted(OLDER))
def test_older_spellings_are_read(model_type: str) -> None:
    system, changes = OLDER[model_type]
    expected = compose([f"model={system}"], Architecture)
    assert used(read(families()[model_type], V3 | changes)) == used(expected)


def test_deepseek_v4_reads_the_names_of_its_own_release() -> None:
    ratios = [0, 0, *([4, 128] * 20), 4, 0]
    fields = {
        **{"hidden_size": 4096, "num_hidden_layers": 43, "vocab_size": 129280, "head_dim": 512},
        **{"num_attention_heads": 64, "num_key_value_heads": 1, "q_lora_rank": 1024, "o_groups": 8},
        **{"o_lora_rank": 1024, "qk_rope_head_dim": 64, "sliding_window": 128, "compress_ratios": ratios},
        **{"index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "num_hash_layers": 3},
        **{"hc_mult": 4, "hc_eps": 1e-6, "hc_sinkhorn_iters": 20, "swiglu_limit": 10.0, "hidden_act": "silu"},
        **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6, "norm_topk_prob": True},
        **{"moe_intermediate_size": 2048, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus"},
        **{"topk_method": "noaux_tc", "rms_norm_eps": 1e-6, "rope_theta": 10000, "attention_bias": False},
        **{"compress_rope_theta": 160000, "num_nextn_predict_layers": 1, "expert_dtype": "fp4"},
        "rope_scaling": {
            **{"beta_fast": 32, "beta_slow": 1, "factor": 16, "type": "yarn"},
            "original_max_position_embeddings": 65536,
        },
    }
    expected = compose(["model=deepseek_v4_flash"], Architecture)
    assert used(read(families()["deepseek_v4"], fields)) == used(expected)


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"n_shared_experts": None}, "n_shared_experts"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v32", {"index_topk_ratio": 0.5}, "index_topk_ratio"),
        ("glm_moe_dsa", {"indexer_types": ["full"] * 3}, "indexer_types"),
        ("deepseek_v4", {"layer_types": ["full_attention"] * 61}, "full_attention"),
        ("deepseek_v4", {"compress_ratios": [0, 8] * 31}, "compress_ratios"),
        ("longcat_flash", {"zero_expert_type": "drop"}, "zero_expert_type"),
    ],
)
def test_what_cannot_be_built_is_named(model_type: str, changes: dict[str, Any], named: str) -> None:
    small = {
        "deepseek_v2": "deepseek_v2",
        "deepseek_v32": "deepseek_v3_2",
        "deepseek_v4": "deepseek_v4_flash",
        "glm_moe_dsa": "glm_5",
    }
    config = compose([f"model={small.get(model_type, model_type)}"], Architecture)
    family, written = family_for(config, model_type)
    if "compress_ratios" in changes:
        del written["layer_types"]
    with pytest.raises((CheckpointError, ConfigError), match=named):
        read(family, written | changes)
