"""Gemma 2."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, with_heads

PLAIN = [
    *("residual=sandwich", "model.activation.kind=geglu", f"model.embedding_scale={32**0.5}"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none", "mixer.attn.rotary_dim=8"),
    *("mixer.attn.has_output_bias=${mixer.attn.has_bias}", "layout.ffn.pattern=dense"),
]

FAMILIES: dict[str, Drawn] = {
    "gemma2": Drawn(
        with_heads(
            lines(
                PLAIN,
                layout__pattern=st.sampled_from(["swa attn", "2*swa attn", "attn"]),
                model__has_tied_embeddings=st.booleans(),
                model__logit_cap=st.sampled_from(["null", "2.0", "30.0"]),
                mixer__attn__logit_cap=st.sampled_from(["null", "0.5", "50.0"]),
                mixer__attn__scale=st.sampled_from([8**-0.5, 12**-0.5]),
                mixer__attn__has_bias=st.booleans(),
                mixer__swa__window=st.sampled_from([1, 7, 100]),
            )
        ).filter(lambda overrides: "mixer.attn.num_heads=6" not in overrides)  # must divide the width
    ),
}
