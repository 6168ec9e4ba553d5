"""Equal to transformers' latent attention of every system that is a setting of ours, with random weights."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from model.mixers.mla import MlaConfig
from tests.layers import FULL, Theirs, assert_same_layer, entry

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, HEADS = 32, 4
SIZES = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    # The dim of their rotary angles.
    "head_dim": 4,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"original_max_position_embeddings": 64}


FIELDS = {"num_heads": HEADS, "query_latent_dim": 12, "latent_dim": 10, "key_dim": 6, "shared_key_dim": 4}
FIELDS |= {"value_dim": 5, "rotary_dim": 4, "has_zero_centered_norm": False}


def mla(**fields: Any) -> MlaConfig:
    """Latent attention of the sizes above, and what is set."""
    return entry("mla", **(FIELDS | fields))


def import_mla(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Theirs puts the value rows of a head behind its key rows."""
    down = [theirs[name] for name in ("q_a_proj.weight", "kv_a_proj_with_mqa.weight") if name in theirs]
    keys, values = theirs["kv_b_proj.weight"].unflatten(0, (HEADS, -1)).split([6, 5], dim=1)
    ours = {
        "down_proj.weight": torch.cat(down),
        "q_proj.weight": theirs.get("q_b_proj.weight", theirs.get("q_proj.weight")),
        "kv_norm.weight": theirs["kv_a_layernorm.weight"],
        "kv_proj.weight": torch.cat([keys.flatten(0, 1), values.flatten(0, 1)]),
        "out_proj.weight": theirs["o_proj.weight"],
    }
    if "q_a_layernorm.weight" in theirs:
        ours["q_norm.weight"] = theirs["q_a_layernorm.weight"]
    return {name: weight for name, weight in ours.items() if weight is not None}


def compare(config: MlaConfig, theirs: Theirs, name: str = "Attention") -> None:
    layer = theirs.layer(0, name)
    ours = config.build(WIDTH, 0, 2, 0.02)
    assert_same_layer(ours, layer, theirs.run(layer, FULL), import_mla, width=WIDTH, tokens=40)


@pytest.mark.parametrize("query_latent_dim", [12, None])
@pytest.mark.parametrize("mscale", [None, 0.707])
def test_deepseek_v2(query_latent_dim: int | None, mscale: float | None) -> None:
    rope = YARN | ({} if mscale is None else {"mscale": mscale, "mscale_all_dim": mscale})
    sizes = SIZES | {"q_lora_rank": query_latent_dim, "rope_parameters": rope}
    theirs = Theirs("deepseek_v2", "DeepseekV2", **sizes)
    scaling = {"kind": "yarn", "factor": 40.0, "original_context": 64, "mscale": mscale}
    scaling["mscale_all_dim"] = mscale
    compare(mla(query_latent_dim=query_latent_dim, rotary_scaling=scaling), theirs)


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_deepseek_v3(layout: str) -> None:
    rope = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    fields = {"rope_parameters": rope, "rope_interleave": layout == "interleaved"}
    theirs = Theirs("deepseek_v3", "DeepseekV3", **SIZES, **fields)
    scaling = {"kind": "yarn", "factor": 40.0, "original_context": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    compare(mla(rotary_layout=layout, rotary_scaling=scaling), theirs)


def test_kimi_linear_has_no_positions() -> None:
    theirs = Theirs("kimi_linear", "KimiLinear", **(SIZES | {"q_lora_rank": None}))
    compare(mla(query_latent_dim=None, rotary_dim=0), theirs)


def test_glm4_moe_lite() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    theirs = Theirs("glm4_moe_lite", "Glm4MoeLite", **SIZES, rope_parameters=rope)
    compare(mla(rotary_theta=1e6), theirs)


def test_longcat_flash() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e7}
    theirs = Theirs("longcat_flash", "LongcatFlash", **SIZES, rope_parameters=rope)
    compare(mla(rotary_theta=1e7, has_latent_scale=True), theirs, "MLA")
