"""LFM2 with experts."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads

FAMILIES: dict[str, Drawn] = {
    "lfm2_moe": Drawn(
        with_heads(
            lines(
                [
                    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
                    *("mixer.attn.rotary_dim=8", "mixer.attn.qk_norm=head", "mixer.attn.output_gate=none"),
                    *("moe.shared_hidden=0", "moe.weight_eps=1e-6"),
                ],
                model__depth=st.sampled_from([2, 3]),
                model__has_tied_embeddings=st.booleans(),
                layout__pattern=st.sampled_from(["conv attn", "2*conv attn", "attn", "conv"]),
                layout__ffn__first=st.sampled_from(["", "dense", "2*dense"]),
                mixer__conv__conv_width=st.sampled_from([2, 3]),
                moe__has_normalized_weights=st.booleans(),
                moe__weight_scale=st.sampled_from([1.0, 2.5]),
                moe__top_k=top_k,
            )
        )
    )
}
