"""Grouped-query attention over sigmoid experts with a shared one: GLM-4.5, dots1, Solar Open, Hy3."""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads
from tests.model.hf.draws.mla import scaled
from tests.model.hf.vision import open_beside_vision

PLAIN = [
    *("layout=attn", "moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("mixer.attn.output_gate=none", "mixer.attn.rotary_dim=8", "moe.shared_hidden=16", "model.depth=3"),
]
FIRST = st.sampled_from(["", "dense", "2*dense"])


def experts(*more: str, **drawn: st.SearchStrategy) -> st.SearchStrategy[list[str]]:
    """Heads, groups of experts and a rotary that is stretched or not."""
    common = {
        "moe__top_k": top_k,
        "moe__shared_hidden": st.sampled_from([16, 32]),
        "moe__weight_scale": st.sampled_from([1.0, 2.5]),
        "moe__has_normalized_weights": st.booleans(),
        "mixer__attn__has_bias": st.booleans(),
    }
    return scaled(with_heads(lines([*PLAIN, *more], **(common | drawn))), "attn")


VISION = {"hidden_size": 8, "depth": 1, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 32}


def open_glm4v(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """The whole model."""
    return open_beside_vision(directory, "glm4v_moe", "Glm4vMoeForConditionalGeneration", VISION)


FAMILIES: dict[str, Drawn] = {
    "glm4_moe": Drawn(
        experts(
            layout__ffn__first=FIRST,
            mixer__attn__qk_norm=st.sampled_from(["none", "head"]),
            mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
        )
    ),
    "glm4v_moe": Drawn(
        experts(
            "mixer.attn.qk_norm=none",
            layout__ffn__first=FIRST,
            mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
        ),
        open_glm4v,
    ),
    "solar_open": Drawn(experts("mixer.attn.qk_norm=none")),
    "dots1": Drawn(
        experts(
            *("mixer.attn.qk_norm=head", "mixer.attn.has_output_bias=${mixer.attn.has_bias}"),
            layout__ffn__first=FIRST,
            layout__pattern=st.sampled_from(["attn", "swa", "2*attn swa", "attn swa"]),
            mixer__swa__window=st.sampled_from(["1", "9", "200"]),
        )
    ),
    "hy_v3": Drawn(
        experts(
            *("mixer.attn.qk_norm=head", "mixer.attn.has_output_bias=${mixer.attn.has_bias}"),
            moe__has_normalized_weights=st.just(True),
            layout__ffn__first=FIRST,
            layout__ffn__pattern=st.sampled_from(["moe", "moe dense"]),
        ).map(lambda found: [*found, "moe.num_groups=1", "moe.kept_groups=1"])
    ),
}
