"""Families with windows, chunks or chosen blocks: published configs, and what they may not hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.compose import compose
from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import families
from model.hf.fields import Fields
from model.hf.parts import attn_of
from model.hf.pieces import Mapped
from model.hf.pretrained import family_for, load_pretrained, save_pretrained, state_of, used
from model.language_model import LanguageModel
from tests.architectures import random_model
from tests.model.hf import hub_configs as hub

PUBLISHED = {
    "gpt_oss_120b": ("gpt_oss",),
    "gpt_oss_20b": ("gpt_oss",),
    "gemma2_27b": ("gemma2",),
    "llama4_scout": ("llama4_text", "llama4"),
    "llama4_maverick": ("llama4_text", "llama4"),
    "dbrx": ("dbrx",),
    "mimo_v2_flash": ("mimo_v2_flash",),
    "minimax_m3": ("minimax_m3_vl_text", "minimax_m3_vl"),
    "step_3_5_flash": ("step3p5", "step3p7"),
}
CASES = [(name, kind) for name, kinds in PUBLISHED.items() for kind in kinds]


@pytest.mark.parametrize(("name", "model_type"), CASES)
def test_a_published_model_translates_and_has_a_place_for_every_tensor(name: str, model_type: str) -> None:
    config = compose([f"model={name}"], Architecture)
    family, _ = family_for(config, model_type)
    # Tensors by expert are many; the first layers have all kinds.
    shorter = compose([f"model={name}", f"model.depth={min(config.model.depth, 8)}"], Architecture)
    with torch.device("meta"):
        model = LanguageModel(shorter)
    mapped = Mapped(family.pieces(shorter), state_of(model))
    assert all(name.endswith("router.bias") for name in mapped.uncovered)


def read(model_type: str, fields: dict[str, Any]) -> Architecture:
    family, found = families()[model_type], Fields(fields, model_type, families()[model_type].aliases)
    overrides = family.read(found)
    found.finish()
    return compose(overrides, Architecture)


SPELLED = {
    "gpt_oss_20b": ("gpt_oss", hub.GPT_OSS),
    "gemma2_27b": ("gemma2", hub.GEMMA2),
    "llama4_scout": ("llama4", hub.SCOUT),
    "dbrx": ("dbrx", hub.DBRX),
    "mimo_v2_flash": ("mimo_v2_flash", hub.MIMO),
    "minimax_m3": ("minimax_m3_vl", hub.M3),
    "step_3_5_flash": ("step3p5", hub.STEP),
}


@pytest.mark.parametrize("name", SPELLED)
def test_the_spelling_of_the_hub_means_the_same(name: str) -> None:
    model_type, fields = SPELLED[name]
    assert used(read(model_type, fields)) == used(compose([f"model={name}"], Architecture))


def changed(fields: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    nested = fields.get("text_config")
    return fields | {"text_config": nested | change} if nested else fields | change


LLAMA3 = {
    **{"type": "llama3", "factor": 2.0, "original_max_position_embeddings": 8192},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt_oss_20b", {"rope_scaling": None}, "rope_parameters or rope_scaling"),
        ("gpt_oss_20b", {"experts_per_token": 2}, "experts_per_token"),
        ("gpt_oss_20b", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ("gpt_oss_20b", {"layer_types": ["chunked_attention"] * 24}, "chunked_attention"),
        ("gemma2_27b", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma2_27b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama4_scout", {"layer_types": ["full_attention"] * 48}, "no_rope_layers"),
        ("llama4_scout", {"model_type": "qwen3_moe"}, "model_type"),
        ("llama4_scout", {"tie_word_embeddings": True, "moe_layers": [0]}, None),
        ("dbrx", {"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta is 500000"),
        ("dbrx", {"attn_config": {"kv_n_heads": 8, "attn_pdrop": 0.1}}, "attn_pdrop"),
        ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2.0}}, "moe_normalize_expert_weights"),
        ("mimo_v2_flash", {"swa_num_key_value_heads": 4}, "swa_num_key_value_heads"),
        ("mimo_v2_flash", {"add_full_attention_sink_bias": True}, "add_full_attention_sink_bias"),
        ("minimax_m3", {"rotary_dim": 128}, "rotary_dim"),
        ("minimax_m3", {"num_key_value_heads": 8}, "index_n_heads"),
        ("minimax_m3", {"attention_output_gate": True}, "attention_output_gate"),
        ("minimax_m3", {"rope_scaling": LLAMA3}, "without rotary scaling"),
        ("llama4_scout", {"rope_scaling": LLAMA3 | {"factor": None}}, "llama3 lacks factor"),
        ("step_3_5_flash", {"sink": True}, "sink"),
        ("step_3_5_flash", {"swiglu_limits": [7, *[0.0] * 47]}, None),
        ("step_3_5_flash", {"swiglu_limits": [0.0] * 5 + [7] + [0.0] * 42}, "swiglu_limits"),
        ("step_3_5_flash", {"swiglu_limits_shared": [16] * 48}, "swiglu_limits_shared"),
        ("step_3_5_flash", {"rope_theta": [1e4, *[5e6] * 47]}, "rope_theta"),
        ("step_3_5_flash", {"use_rope_layers": [False] * 45}, "use_rope_layers"),
        ("step_3_5_flash", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
    ],
)
def test_what_is_not_built_is_named(name: str, change: dict[str, Any], message: str | None) -> None:
    model_type, fields = SPELLED[name]
    if message is None:
        assert read(model_type, changed(fields, change))
        return
    with pytest.raises(CheckpointError, match=message):
        read(model_type, changed(fields, change))


def test_a_window_counts_the_token_itself() -> None:
    fields = {name: value for name, value in hub.MIMO.items() if name != "attention_chunk_size"}
    assert attn_of(read("mimo_v2_flash", fields), "swa").window == 129
    del fields["sliding_window_size"]
    assert attn_of(read("mimo_v2_flash", fields), "swa").window == 128


def test_tied_embeddings_are_read_where_they_stand() -> None:
    fields = changed(hub.SCOUT, {"tie_word_embeddings": False})
    assert read("llama4", hub.SCOUT | {"tie_word_embeddings": True}).model.has_tied_embeddings
    with pytest.raises(CheckpointError, match="tie_word_embeddings is False"):
        read("llama4", fields | {"tie_word_embeddings": True})


def saved(name: str, model_type: str, directory: Path) -> LanguageModel:
    """A small model of that system, written; routers without a bias, for which not all have a place."""
    config = compose([f"model={name}", "model.width=32", "model.vocab_size=64"], Architecture)
    model = random_model(config, torch.float32)
    for router in model.routers():
        router.bias.zero_()
    save_pretrained(model, directory, model_type=model_type)
    return model


def test_experts_in_four_bits_are_to_be_dequantised(tmp_path: Path) -> None:
    saved("gpt_oss_small", "gpt_oss", tmp_path / "hub")
    change_config(tmp_path / "hub", {"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(CheckpointError, match=r"mxfp4.*dequantise"):
        load_pretrained(tmp_path / "hub")
    change_config(tmp_path / "hub", {"quantization_config": None})
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = load_file(tmp_path / "hub" / "model.safetensors")
    tensors |= {f"{name}_{end}": torch.zeros(2, dtype=torch.uint8) for end in ("blocks", "scales")}
    del tensors[name]
    save_file(tensors, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj_blocks.*dequantise"):
        load_pretrained(tmp_path / "hub")


def change_config(directory: Path, change: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("name", "model_type", "other"),
    [
        ("llama4_small", "llama4", "vision_model.class_embedding"),
        ("mimo_v2_flash_small", "mimo_v2_flash", "model.mtp.layers.0.eh_proj.weight"),
        ("minimax_m3_small", "minimax_m3_vl", "vision_tower.vision_model.pre_layrnorm.weight"),
        ("step_3_5_flash_small", "step3p5", "model.layers.7.eh_proj.weight"),
        ("step_3_5_flash_small", "step3p7", "vit_large_projector.weight"),
    ],
)
def test_other_parts_are_left_out_and_named(
    name: str, model_type: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(name, model_type, tmp_path / "hub")
    path = tmp_path / "hub" / "model.safetensors"
    save_file(load_file(path) | {other: torch.zeros(2)}, path)
    again = load_pretrained(tmp_path / "hub")
    assert f"leaves out 1 tensors of other parts, such as {other}" in capsys.readouterr().out
    for (key, ours), (_, read_back) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, read_back), key


def test_a_text_model_alone_is_written_as_one() -> None:
    config = compose(["model=llama4_scout"], Architecture)
    assert family_for(config, None)[0].model_type == "llama4_text"
