"""MiniMax-M3."""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k
from tests.model.hf.vision import open_beside_vision

PLAIN = [
    *("moe=sigmoid", "residual=pre_norm", "model.activation.kind=shifted_swiglu"),
    *("mixer.attn.qk_norm=head", "mixer.attn.output_gate=none"),
]
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def open_theirs(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers' model of a nested directory."""
    name = "MiniMaxM3SparseForConditionalGeneration"
    return open_beside_vision(directory, "minimax_m3_vl", name, VISION)


layouts = lines(
    PLAIN,
    layout__pattern=st.sampled_from(["attn 3*msa", "msa", "attn", "attn msa"]),
    layout__ffn__pattern=st.sampled_from(["moe", "dense moe", "dense"]),
    # The low limit cuts many gates and ups at this size.
    model__activation__limit=st.sampled_from([0.3, 7.0]),
    mixer__msa__index_dim=st.sampled_from([8, 12]),
    mixer__msa__block=st.sampled_from([1, 3, 8]),
    mixer__msa__num_blocks=st.sampled_from([2, 4]),
    mixer__msa__num_local_blocks=st.sampled_from([1, 2]),
    moe__weight_scale=st.sampled_from([1.0, 2.0]),
    moe__shared_hidden=st.sampled_from([8, 16]),
    moe__top_k=top_k,
)
shapes = st.tuples(st.sampled_from([(4, 2), (2, 1), (6, 3)]), st.sampled_from([2, 4, 8]))
drawn = st.tuples(layouts, shapes).map(
    lambda pair: [
        *pair[0],
        *(f"mixer.{mixer}.num_heads={pair[1][0][0]}" for mixer in ("attn", "msa")),
        *(f"mixer.{mixer}.num_key_heads={pair[1][0][1]}" for mixer in ("attn", "msa")),
        *(f"mixer.{mixer}.rotary_dim={pair[1][1]}" for mixer in ("attn", "msa")),
        "mixer.msa.rotary_theta=${mixer.attn.rotary_theta}",
    ]
)

FAMILIES: dict[str, Drawn] = {
    "minimax_m3_vl_text": Drawn(drawn),
    "minimax_m3_vl": Drawn(drawn, open_theirs),
}
