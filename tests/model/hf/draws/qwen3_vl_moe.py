"""Qwen3-VL and Qwen3-Omni with experts, their text models inside the whole ones."""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads
from tests.model.hf.vision import open_beside_vision

VISION = {
    **{"hidden_size": 8, "depth": 1, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 32},
    **{"deepstack_visual_indexes": [], "num_position_embeddings": 4},
}
AUDIO = {
    **{"d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 8},
    **{"output_dim": 32, "downsample_hidden_size": 8, "num_mel_bins": 8},
}


def open_vl(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """The whole model."""
    return open_beside_vision(directory, "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", VISION)


def open_thinker(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """The thinker, which reads its part of the whole model."""
    name = "Qwen3OmniMoeThinkerForConditionalGeneration"
    return open_beside_vision(directory, "qwen3_omni_moe_thinker", name, VISION, audio_config=AUDIO)


def text(**drawn: st.SearchStrategy) -> st.SearchStrategy[list[str]]:
    """Qwen3-MoE, with experts that are not square when gates and ups are in one tensor."""
    return with_heads(
        lines(
            [
                *("layout=attn", "moe=softmax", "residual=pre_norm", "mixer.attn.output_gate=none"),
                *("residual.has_zero_centered_norm=false", "mixer.attn.rotary_dim=8", "model.depth=2"),
                *("moe.shared_hidden=0", "moe.has_shared_gate=false", "mixer.attn.qk_norm=head"),
                *("mixer.attn.has_output_bias=${mixer.attn.has_bias}", "moe.hidden=12"),
            ],
            model__has_tied_embeddings=st.booleans(),
            mixer__attn__has_bias=st.booleans(),
            layout__ffn__pattern=st.sampled_from(["moe", "dense moe"]),
            moe__top_k=top_k,
            **drawn,
        )
    )


normalized = st.booleans()
FAMILIES: dict[str, Drawn] = {
    "qwen3_vl_moe": Drawn(text(), open_vl),
    "qwen3_omni_moe_thinker": Drawn(text(moe__has_normalized_weights=normalized), open_thinker),
    "qwen3_omni_moe": Drawn(text(moe__has_normalized_weights=normalized), open_thinker),
}
