"""Qwen3-VL and the thinker of Qwen3-Omni with experts, their text models: Qwen3-MoE beside other parts.

In text there are no image features to add to the first layers, and all three positions of a token are one.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from model.config import Architecture
from model.hf.families.gqa import (
    EXPECTS,
    EXPERTS,
    HEADS,
    PLAIN,
    ExpertNames,
    head_dim_of,
    layer_pieces,
    moe_family,
    write_qwen3_moe,
)
from model.hf.family import Family, Nested, inside
from model.hf.fields import Fields, shown
from model.hf.parts import attn_of, experts_fused, layout_lines, rope_of, rotary_of, skeleton
from model.hf.pieces import Piece, TensorView, whole

NAMES = ExpertNames("mlp.gate", "mlp.experts")
PAIRS = (
    HEADS
    | EXPERTS
    | {
        "num_experts": "moe.num_experts",
        "moe_intermediate_size": "moe.hidden",
        "intermediate_size": "model.ffn_hidden",
        "rms_norm_eps": ("residual.norm_eps", 1e-6),
        "attention_bias": ("mixer.attn.has_bias", False),
    }
)
FIXED = ("moe=softmax", *PLAIN, "mixer.attn.qk_norm=head")
MROPE = ("mrope_section", "mrope_interleaved", "interleaved")
# Fields of the published text models that transformers drops, with what they must be.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "shared_expert_intermediate_size": (0,),
    "use_qk_norm": (True,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    # transformers rotates whole heads.
    "partial_rotary_factor": (1.0,),
}


def read_more(theta: float) -> Callable[[Fields], list[str]]:
    """Layers that are dense by position, and heads that are rotated wholly."""

    def read(fields: Fields) -> list[str]:
        depth, dense = fields.take("num_hidden_layers"), fields.take("mlp_only_layers", None) or []
        sparse_step, dim = fields.take("decoder_sparse_step", 1), head_dim_of(fields)
        ffns = ["dense" if i in dense or (i + 1) % sparse_step else "moe" for i in range(depth)]
        for name, allowed in PUBLISHED.items():
            fields.expect(name, *allowed)
        for name in ("max_window_layers", "router_aux_loss_coef"):
            fields.take(name, None)
        rope = {name: value for name, value in rope_of(fields, theta).items() if name not in MROPE}
        return [
            f"mixer.attn.head_dim={dim}",
            f"mixer.attn.rotary_dim={dim}",
            f"mixer.attn.has_output_bias={shown(fields.take('attention_bias', False))}",
            *rotary_of(rope, "attn"),
            *layout_lines(["attn"] * depth, ffns),
        ]

    return read


def write_more(config: Architecture) -> dict[str, Any]:
    """What `read_more` reads, with the sections of image positions."""
    found, half = write_qwen3_moe(config), attn_of(config).rotary_dim // 2
    sections = [(half + 2) // 3, (half + 1) // 3, half // 3]
    rope = {"mrope_interleaved": True, "mrope_section": sections}
    return found | {"rope_parameters": found["rope_parameters"] | rope}


def pieces(config: Architecture) -> Iterator[Piece]:
    """Where every tensor stands: routed experts are in one tensor each way, transposed."""
    yield from skeleton(config)
    for index, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
        found = layer_pieces(config, ours, theirs, layer, NAMES)
        yield from (piece for piece in found if not piece.ours.startswith(f"{ours}moe.experts."))
    yield from fused(config, lambda x: x.mT)


def fused(config: Architecture, view: TensorView, *shapes: tuple[int, ...] | None) -> Iterator[Piece]:
    """Routed experts of all layers; shapes of gates and ups and of downs, where they matter."""
    for index, layer in enumerate(config.layers):
        if layer.ffn == "moe":
            ours, theirs = f"blocks.{index}.moe.experts.", f"model.layers.{index}.mlp.experts."
            parts = experts_fused(ours, theirs, ("gate_up_proj", "down_proj"), view)
            for piece, shape in zip(parts, shapes or (None, None), strict=True):
                yield piece._replace(shape=shape)


def as_saved(config: Architecture) -> Iterator[Piece]:
    """Routed experts as transformers writes them, which reads both ways: not transposed.

    What is square is read as the hub has it.
    """
    experts, hidden, width = config.moe.num_experts, config.moe.hidden, config.model.width
    if width not in (hidden, 2 * hidden):
        yield from fused(config, whole, (experts, 2 * hidden, width), (experts, width, hidden))


TEXT = Family(
    "qwen3_vl_moe_text",
    "",
    PAIRS,
    pieces,
    fixed=(*FIXED, "moe.has_normalized_weights=true"),
    expects=EXPECTS | {"norm_topk_prob": (True,)},
    read_more=read_more(500_000.0),
    write_more=write_more,
    aliases={"num_local_experts": "num_experts"},
    instead=(as_saved,),
)
VL = inside(
    TEXT,
    "qwen3_vl_moe",
    "Qwen3VLMoeForConditionalGeneration",
    Nested(
        ("qwen3_vl_moe_text",),
        silent=(
            *("vision_config", "image_token_id", "video_token_id"),
            *("vision_start_token_id", "vision_end_token_id"),
        ),
    ),
    {"": "", "model.": "model.language_model."},
    left_out=(r"model\.visual\..*",),
)
SPOKEN = (
    *("audio_config", "vision_config", "position_id_per_seconds", "audio_start_token_id", "user_token_id"),
    *("audio_token_id", "image_token_id", "video_token_id", "audio_end_token_id", "initializer_range"),
    *(
        "vision_start_token_id",
        "vision_end_token_id",
        "talker_config",
        "code2wav_config",
        "assistant_token_id",
    ),
    *("enable_audio_output", "im_start_token_id", "im_end_token_id", "tts_pad_token_id", "tts_bos_token_id"),
    *("tts_eos_token_id", "system_token_id"),
)
THINKER_TEXT = replace(
    TEXT,
    pairs=PAIRS | {"norm_topk_prob": ("moe.has_normalized_weights", True)},
    pieces=moe_family(NAMES),
    fixed=FIXED,
    expects=EXPECTS,
    read_more=read_more(1e6),
    instead=(),
)
OMNI = inside(
    THINKER_TEXT,
    "qwen3_omni_moe",
    "Qwen3OmniMoeForConditionalGeneration",
    Nested(("qwen3_omni_moe_text",), silent=SPOKEN, outer="thinker_config"),
    {"": "thinker."},
    left_out=(r"(talker|code2wav|thinker\.(model\.)?(audio_tower|visual))\..*",),
)
THINKER = inside(
    THINKER_TEXT,
    "qwen3_omni_moe_thinker",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    Nested(("qwen3_omni_moe_text",), silent=SPOKEN),
    {"": ""},
    left_out=(r"(thinker\.)?(model\.)?(audio_tower|visual)\..*",),
    # transformers keeps the names of the model that it took the thinker out of.
    instead=(OMNI.pieces,),
)
FAMILIES = (VL, THINKER, OMNI)
