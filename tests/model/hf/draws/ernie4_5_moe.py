"""ERNIE 4.5 with experts."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads

FAMILIES: dict[str, Drawn] = {
    "ernie4_5_moe": Drawn(
        with_heads(
            lines(
                [
                    *("layout=attn", "moe=softmax", "residual=pre_norm", "mixer.attn.rotary_dim=8"),
                    *("residual.has_zero_centered_norm=false", "mixer.attn.qk_norm=none"),
                    *("mixer.attn.output_gate=none", "mixer.attn.rotary_layout=interleaved"),
                    *("moe.has_shared_gate=false", "moe.hidden=16"),
                ],
                model__depth=st.sampled_from([2, 3]),
                model__has_tied_embeddings=st.booleans(),
                layout__ffn__pattern=st.sampled_from(["moe", "dense moe", "dense"]),
                moe__shared_hidden=st.sampled_from([0, 16, 32]),
                moe__top_k=top_k,
            )
        )
    )
}
