"""Families of latent attention: DeepSeek-V2 and -V3, Kimi K2, GLM-4.7-Flash."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from conf.errors import CheckpointError
from model.config import Architecture
from model.hf.family import Family, Nested, inside
from model.hf.fields import Fields
from model.hf.latent import (
    EXPECTS,
    MTP_FIELDS,
    NOAUX,
    PLAIN,
    REPEATED,
    SIGMOID,
    UNUSED,
    V3_SIGMOID,
    common,
    copies,
    latent_of,
    mlp_layer_types,
    pieces,
    sizes,
    write_common,
)


def read_v2(fields: Fields) -> list[str]:
    """Groups count only where the method asks for them; multi-token prediction is not known."""
    method = fields.take("topk_method", "greedy")
    groups, kept = fields.take("n_group", None), fields.take("topk_group", None)
    if method == "greedy":
        groups, kept = 1, 1
    elif method != "group_limited_greedy":
        raise CheckpointError(f"topk_method is {method!r}; built are greedy and group_limited_greedy")
    fields.expect("num_nextn_predict_layers", 0, None)
    found = [f"moe.num_groups={groups}", f"moe.kept_groups={kept}"]
    return [*found, *common(fields, "mla", 0)]


def write_v2(config: Architecture) -> dict[str, Any]:
    """What `read_v2` reads."""
    moe, found = config.moe, write_common(config, "mla")
    del found["num_nextn_predict_layers"]
    found |= {"n_group": moe.num_groups, "topk_group": moe.kept_groups}
    return found | {"topk_method": "group_limited_greedy" if moe.num_groups > 1 else "greedy"}


def read_v3(default_dense: int) -> Callable[[Fields], list[str]]:
    """Latent attention whose rotary layout is a field."""

    def read_more(fields: Fields) -> list[str]:
        turned = fields.take("rope_interleave", True)
        fields.require("num_key_value_heads", fields.take("num_attention_heads"), None)
        layout = f"mixer.mla.rotary_layout={'interleaved' if turned else 'half_split'}"
        return [layout, *common(fields, "mla", default_dense)]

    return read_more


def read_lite(fields: Fields) -> list[str]:
    """The same; transformers knows dense layers from their list alone, without which the first one is."""
    if fields.take("mlp_layer_types", None) is None:
        fields.expect("first_k_dense_replace", 1)
    return read_v3(1)(fields)


def write_v3(config: Architecture) -> dict[str, Any]:
    """What `read_v3` reads, with layers that are dense by position alone."""
    interleaves = latent_of(config, "mla").rotary_layout == "interleaved"
    return write_common(config, "mla") | {"rope_interleave": interleaves}


def write_v3_by_layer(config: Architecture) -> dict[str, Any]:
    """What `read_v3` reads."""
    return write_v3(config) | {"mlp_layer_types": mlp_layer_types(config)}


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    sizes("mla") | V3_SIGMOID,
    pieces,
    fixed=("moe=sigmoid", *PLAIN, *UNUSED),
    expects=NOAUX,
    read_more=read_v3(3),
    write_more=write_v3,
    **MTP_FIELDS,
)
# The language model of Kimi K2.5, which transformers calls deepseek_v3 and the hub kimi_k2.
KIMI_K25 = inside(
    DEEPSEEK_V3,
    "kimi_k25",
    "Kimi_K25ForConditionalGeneration",
    Nested(
        ("deepseek_v3", "kimi_k2"),
        silent=(
            *("vision_config", "image_token_id", "video_token_id", "vision_start_token_id"),
            *("projection_hidden_size", "projection_layer_norm_eps", "media_placeholder_token_id"),
            *("ignore_index", "use_unified_vision_chunk", "video_placeholder", "vision_end_token_id"),
        ),
        is_tied=True,
    ),
    {"": "language_model."},
    left_out=(r"(model\.)?(vision_tower|mm_projector)\..*",),
    ignored=tuple(r"language_model\." + pattern for pattern in REPEATED),
    mtp=r"language_model\.model\.layers\.{depth}\..*",
    copies=lambda config: {
        f"language_model.{name}": f"language_model.{source}" for name, source in copies(config).items()
    },
)
FAMILIES = (
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        sizes("mla"),
        pieces,
        fixed=("moe=softmax", *PLAIN, *UNUSED, "moe.has_normalized_weights=false"),
        expects=EXPECTS | {"scoring_func": ("softmax",), "norm_topk_prob": (False,), "mlp_bias": (False,)},
        read_more=read_v2,
        write_more=write_v2,
        aliases={"num_experts": "n_routed_experts"},
    ),
    DEEPSEEK_V3,
    # The same under the name that Kimi K2 gives it.
    replace(DEEPSEEK_V3, model_type="kimi_k2", is_second=True),
    KIMI_K25,
    Family(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        sizes("mla", 1e-5) | SIGMOID,
        pieces,
        fixed=("moe=sigmoid", *PLAIN, *UNUSED),
        expects=NOAUX,
        read_more=read_lite,
        write_more=write_v3_by_layer,
        **MTP_FIELDS,
    ),
)
