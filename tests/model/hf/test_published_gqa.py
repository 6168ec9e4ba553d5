"""Published systems of grouped-query attention, plain or beside convolutions, are models of a family."""

import pytest

from conf.compose import compose
from model.config import Architecture
from model.hf.pretrained import family_for

FAMILIES = {
    "glm_4_6": "glm4_moe",
    "glm_4_6_small": "glm4_moe",
    "lfm2_8b_a1b": "lfm2_moe",
    "mistral_7b": "mistral",
    "mixtral_8x7b": "mixtral",
    "mixtral_8x22b": "mixtral",
    "olmoe_1b_7b": "olmoe",
    "minimax_m2": "minimax_m2",
    "mistral_large_3": "deepseek_v3",
    "qwen3_235b_a22b": "qwen3_moe",
    "qwen3_30b_a3b": "qwen3_moe",
    "mistral_small": "mistral",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_its_config_translates_both_ways(name: str) -> None:
    family, fields = family_for(compose([f"model={name}"], Architecture), None)
    assert family.model_type == FAMILIES[name]
    assert name != "mistral_7b" or fields["sliding_window"] == 4096
