"""Qwen3.5, dense or with experts: Qwen3-Next with plain projections, a text model alone or in the whole one.

The hub has the routed experts of the model fused and those of the MTP module one by one;
transformers writes all of them one by one. Both ways are read, for each layer on its own.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from model.config import Architecture
from model.hf.families.qwen3_next import (
    EXPECTS,
    FIXED,
    MTP,
    PAIRS,
    layer_pieces,
    layer_prefixes,
    prediction_pieces,
    read_mixers,
    write_mixers,
)
from model.hf.family import Family, Nested, inside
from model.hf.fields import Fields
from model.hf.parts import attn_of, experts_apart, experts_fused, joined_rows, lines, skeleton
from model.hf.pieces import Piece
from model.mixers.gdn import GdnConfig

EXPERT_FIELDS = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
OWN_FIELDS = ("intermediate_size", "norm_topk_prob")
FUSED = ("gate_up_proj", "down_proj")
MTP_PREFIX = "mtp."


def read_more(fields: Fields) -> list[str]:
    """Layout, rotary and the MTP module, all with experts."""
    fields.take("intermediate_size", None)
    fields.expect("mlp_only_layers", [], None)
    return read_layers(fields, "moe")


def read_dense(fields: Fields) -> list[str]:
    """Layout, rotary and the MTP module, all dense."""
    return read_layers(fields, "dense")


def read_layers(fields: Fields, ffn: str) -> list[str]:
    """Layout, rotary and the MTP module."""
    # States are kept in float32 while decoding.
    fields.take("mamba_ssm_dtype", None)
    fields.expect("mtp_num_hidden_layers", 0, 1)
    fields.expect("mtp_use_dedicated_embeddings", False)
    fields.expect("attn_output_gate", True)
    return [
        *read_mixers(fields, [ffn] * fields.take("num_hidden_layers")),
        *lines({"model": {"mtp": MTP | {"ffn": ffn}}}),
        f"model.mtp.depth={fields.take('mtp_num_hidden_layers', 0)}",
    ]


def write_more(config: Architecture) -> dict[str, Any]:
    """Layout, rotary with the sections of image positions, and the MTP module."""
    half = attn_of(config).rotary_dim // 2
    sections = [(half + 2) // 3, (half + 1) // 3, half // 3]
    return {
        **write_mixers(config, mrope_interleaved=True, mrope_section=sections),
        "mtp_num_hidden_layers": config.model.mtp.depth,
        "mtp_use_dedicated_embeddings": False,
    }


def write_dense(config: Architecture) -> dict[str, Any]:
    """The same without experts."""
    found = write_more(config)
    del found["router_aux_loss_coef"]
    return found


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands."""
    yield from skeleton(config)
    for ours, theirs, layer in layer_prefixes(config):
        yield from layer_pieces(ours, theirs, layer, config, plain_gdn_pieces)
        if layer.ffn == "moe":
            yield from expert_pieces(config, ours, theirs, is_fused=not ours.startswith(MTP_PREFIX))
    yield from prediction_pieces(config)


def other_experts(config: Architecture) -> Iterator[Piece]:
    """Routed experts in the form that `pieces` does not have."""
    for ours, theirs, layer in layer_prefixes(config):
        if layer.ffn == "moe":
            yield from expert_pieces(config, ours, theirs, is_fused=ours.startswith(MTP_PREFIX))


def expert_pieces(config: Architecture, ours: str, theirs: str, *, is_fused: bool) -> Iterator[Piece]:
    """Routed experts in one tensor each way, or with tensors of their own."""
    mine, other = f"{ours}moe.experts.", f"{theirs}mlp.experts."
    yield from experts_fused(mine, other, FUSED) if is_fused else experts_apart(config, mine, other)


def plain_gdn_pieces(ours: str, theirs: str, gdn: GdnConfig, width: int) -> Iterator[Piece]:
    """Projections one after the other, each with all its heads."""
    keys, values = gdn.num_key_heads * gdn.key_dim, gdn.num_value_heads * gdn.value_dim
    sizes = {"qkv": 2 * keys + values, "z": values, "b": gdn.num_value_heads, "a": gdn.num_value_heads}
    parts = {f"{theirs}in_proj_{name}.weight": size for name, size in sizes.items()}
    yield from joined_rows(f"{ours}in_proj.weight", parts)
    yield Piece(f"{ours}conv.weight", f"{theirs}conv1d.weight", lambda x: x[:, None])
    yield Piece(f"{ours}decay.A_log", f"{theirs}A_log")
    yield Piece(f"{ours}decay.dt_bias", f"{theirs}dt_bias")
    yield Piece(f"{ours}out_norm.weight", f"{theirs}norm.weight")
    yield Piece(f"{ours}out_proj.weight", f"{theirs}out_proj.weight")


TEXT = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    {name: key for name, key in PAIRS.items() if name not in OWN_FIELDS},
    pieces,
    fixed=(*FIXED, "moe.has_normalized_weights=true"),
    expects=EXPECTS | {"norm_topk_prob": (True,)},
    read_more=read_more,
    write_more=write_more,
    mtp=r"mtp\..*",
    # Qwen3-Next's numbers in another order.
    is_second=True,
    float32=(r".*linear_attn\.norm\.weight",),
    instead=(other_experts,),
)
DENSE_TEXT = replace(
    TEXT,
    model_type="qwen3_5_text",
    class_name="Qwen3_5ForCausalLM",
    pairs={name: key for name, key in PAIRS.items() if name not in (*EXPERT_FIELDS, *OWN_FIELDS)}
    | {"intermediate_size": "model.ffn_hidden"},
    fixed=FIXED,
    expects=EXPECTS,
    read_more=read_dense,
    write_more=write_dense,
    is_second=False,
    instead=(),
)


def beside_vision(text: Family, model_type: str, class_name: str) -> Family:
    """The whole model."""
    return inside(
        text,
        model_type,
        class_name,
        Nested(
            (text.model_type,),
            silent=(
                *("vision_config", "image_token_id", "video_token_id"),
                *("vision_start_token_id", "vision_end_token_id"),
            ),
        ),
        {"": "", "model.": "model.language_model."},
        left_out=(r"model\.visual\..*",),
    )


WHOLE = beside_vision(TEXT, "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration")
DENSE = beside_vision(DENSE_TEXT, "qwen3_5", "Qwen3_5ForConditionalGeneration")
# A text model that transformers took out of a whole one keeps the names that it had there.
FAMILIES = (
    replace(TEXT, instead=(*TEXT.instead, WHOLE.pieces, *WHOLE.instead)),
    WHOLE,
    replace(DENSE_TEXT, instead=(DENSE.pieces,)),
    DENSE,
)
