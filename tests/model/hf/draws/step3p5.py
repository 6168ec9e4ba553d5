"""Step-3.5-Flash."""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k
from tests.model.hf.vision import open_beside_vision

PLAIN = [
    *("moe=sigmoid", "residual=pre_norm", "mixer.attn.qk_norm=head", "mixer.attn.output_gate=head"),
    *("layout.first=attn", "layout.ffn.last=moe"),
]
VISION = {"width": 8, "layers": 1, "heads": 1, "image_size": 28, "mlp_ratio": 1.0}
LLAMA3 = ["kind=llama3", "factor=2.0", "original_context=16", "low_frequency=1.0", "high_frequency=32.0"]


def open_theirs(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers' model of a directory, nested or not."""
    return open_beside_vision(directory, "step3p7", "Step3p7ForConditionalGeneration", VISION)


def clamp(name: str, limit: float | None, start: int) -> list[str]:
    """Overrides for the activation of experts."""
    values = {"kind": "swiglu", "limit": "null" if limit is None else limit}
    values |= {"clamps_product": str(limit is not None).lower(), "limit_from": start}
    return [f"moe.{name}.{field}={value}" for field, value in values.items()]


layouts = lines(
    PLAIN,
    layout__pattern=st.sampled_from(["attn 3*swa", "swa", "attn"]),
    layout__ffn__pattern=st.sampled_from(["moe", "dense moe"]),
    mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
    mixer__swa__rotary_dim=st.sampled_from([2, 8]),
    mixer__swa__rotary_theta=st.sampled_from(["10000.0", "500.0"]),
    mixer__swa__window=st.sampled_from([1, 7, 100]),
    moe__weight_scale=st.sampled_from([1.0, 3.0]),
    moe__shared_hidden=st.sampled_from([8, 16]),
    moe__top_k=top_k,
)
heads = st.sampled_from([(4, 6, 2), (2, 3, 1), (4, 4, 4)])
# The low limits cut many products at this size.
clamps = st.tuples(
    st.sampled_from([(None, 0), (0.1, 0), (0.1, 3), (7.0, 3)]),
    st.sampled_from([(None, 0), (0.05, 0), (0.05, 3)]),
)
rotary = st.sampled_from(
    [[], [f"mixer.attn.rotary_scaling.{line}" for line in LLAMA3] + ["mixer.swa.rotary_scaling.kind=none"]]
)
drawn = st.tuples(layouts, heads, clamps, rotary).map(
    lambda pair: [
        *pair[0],
        f"mixer.attn.num_heads={pair[1][0]}",
        f"mixer.swa.num_heads={pair[1][1]}",
        f"mixer.attn.num_key_heads={pair[1][2]}",
        *clamp("activation", *pair[2][0]),
        *clamp("shared_activation", *pair[2][1]),
        *pair[3],
    ]
)

FAMILIES: dict[str, Drawn] = {"step3p5": Drawn(drawn, open_theirs), "step3p7": Drawn(drawn, open_theirs)}
