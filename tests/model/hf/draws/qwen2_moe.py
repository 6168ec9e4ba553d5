"""Qwen1.5-MoE and Qwen2-MoE."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads

FAMILIES: dict[str, Drawn] = {
    "qwen2_moe": Drawn(
        with_heads(
            lines(
                [
                    *("layout=attn", "moe=softmax", "residual=pre_norm", "mixer.attn.rotary_dim=8"),
                    *("residual.has_zero_centered_norm=false", "mixer.attn.qk_norm=none"),
                    *("mixer.attn.output_gate=none", "model.depth=2"),
                ],
                mixer__attn__has_bias=st.booleans(),
                layout__ffn__pattern=st.sampled_from(["moe", "dense moe"]),
                moe__shared_hidden=st.sampled_from([8, 24]),
                moe__has_normalized_weights=st.booleans(),
                moe__top_k=top_k,
            )
        )
    )
}
