"""Families of latent attention over chosen keys: DeepSeek-V3.2 and GLM-5."""

from collections.abc import Callable
from typing import Any

from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.latent import (
    MTP_FIELDS,
    NOAUX,
    PLAIN,
    SIGMOID,
    V3_SIGMOID,
    Pairs,
    common,
    indexer_types,
    mlp_layer_types,
    pieces,
    sizes,
    write_common,
)
from model.hf.parts import pattern_of

INDEXERS = {"full": "dsa", "shared": "dsa_shared"}
INDEXER: Pairs = {
    "index_topk": "mixer.dsa.top_k",
    "index_n_heads": "mixer.dsa.index_heads",
    "index_head_dim": "mixer.dsa.index_dim",
}
UNUSED_POOLS = ("mixer.dsa_pooled.index_pool=1",)


def read_dsa(index_layout: str) -> Callable[[Fields], list[str]]:
    """Sparse attention in every layer."""

    def read_more(fields: Fields) -> list[str]:
        fields.expect("rope_interleave", True)
        fields.require("num_key_value_heads", fields.take("num_attention_heads"), None)
        fields.expect("indexer_rope_interleave", index_layout == "interleaved")
        fields.expect("layer_types", ["indexed_attention"] * fields.take("num_hidden_layers"), None)
        return [f"mixer.dsa.index_rotary_layout={index_layout}", *common(fields, "dsa", 3)]

    return read_more


def read_glm_dsa(fields: Fields) -> list[str]:
    """Sparse attention in every layer; some may read the choice of an earlier one."""
    kinds = indexer_types(fields, fields.take("num_hidden_layers"))
    mixers = pattern_of([INDEXERS.get(kind, kind) for kind in kinds])
    return [*read_dsa("interleaved")(fields), f"layout.pattern={mixers}"]


def write_v32(config: Architecture) -> dict[str, Any]:
    """What `read_dsa` reads."""
    return write_common(config, "dsa") | {"mlp_layer_types": mlp_layer_types(config)}


def write_glm_dsa(config: Architecture) -> dict[str, Any]:
    """What `read_glm_dsa` reads, with the layers that read the choice of an earlier one."""
    names = {ours: theirs for theirs, ours in INDEXERS.items()}
    return write_v32(config) | {
        "indexer_types": [names.get(layer.mixer, layer.mixer) for layer in config.layers]
    }


FAMILIES = (
    Family(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        sizes("dsa") | V3_SIGMOID | INDEXER,
        pieces,
        fixed=("moe=sigmoid", *PLAIN, *UNUSED_POOLS),
        expects=NOAUX | {"mlp_bias": (False,)},
        read_more=read_dsa("half_split"),
        write_more=write_v32,
        **MTP_FIELDS,
    ),
    Family(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        sizes("dsa", 1e-5) | SIGMOID | INDEXER,
        pieces,
        fixed=("moe=sigmoid", *PLAIN, *UNUSED_POOLS),
        expects=NOAUX | {"mlp_bias": (False,)},
        read_more=read_glm_dsa,
        write_more=write_glm_dsa,
        **MTP_FIELDS,
    ),
)
