"""MiMo-V2-Flash."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k

PLAIN = [
    *("moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none", "mixer.swa.has_sinks=true"),
    *("moe.shared_hidden=0", "mixer.attn.head_dim=12"),
]

FAMILIES: dict[str, Drawn] = {
    "mimo_v2_flash": Drawn(
        st.tuples(
            lines(
                PLAIN,
                layout__pattern=st.sampled_from(["5*swa attn", "attn swa", "swa", "attn"]),
                layout__ffn__pattern=st.sampled_from(["moe", "dense 3*moe"]),
                mixer__attn__value_dim=st.sampled_from([8, 12, 16]),
                mixer__attn__rotary_dim=st.sampled_from([2, 4, 12]),
                mixer__attn__has_bias=st.booleans(),
                mixer__attn__value_scale=st.sampled_from([0.707, 1.0]),
                mixer__swa__window=st.sampled_from([1, 7, 100]),
                mixer__swa__rotary_theta=st.sampled_from(["10000.0", "5000000.0"]),
                mixer__swa__rotary_dim=st.sampled_from([2, 4, 12]),
                moe__weight_scale=st.sampled_from([1.0, 2.5]),
                moe__has_normalized_weights=st.booleans(),
                moe__top_k=top_k,
            ),
            st.sampled_from([(4, 2), (4, 1), (2, 1), (6, 3)]),
            st.sampled_from([[], ["moe.num_groups=4", "moe.kept_groups=2"]]),
        ).map(
            # A window has twice the key heads.
            lambda drawn: [
                *drawn[0],
                f"mixer.attn.num_heads={drawn[1][0]}",
                f"mixer.attn.num_key_heads={drawn[1][1]}",
                f"mixer.swa.num_key_heads={2 * drawn[1][1]}",
                *drawn[2],
            ]
        )
    ),
}
