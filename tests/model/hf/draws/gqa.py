"""Plain grouped-query attention over experts."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, window, with_heads

MOE = ["moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false"]
GQA = [
    "mixer.attn.output_gate=none",
    "mixer.attn.rotary_dim=8",
    "moe.shared_hidden=0",
    "moe.has_shared_gate=false",
]
ATTN = ["layout=attn", *MOE, *GQA]
normalized = st.booleans()

FAMILIES: dict[str, Drawn] = {
    "qwen3_moe": Drawn(
        with_heads(
            lines(
                [*ATTN, "mixer.attn.qk_norm=head", "mixer.attn.has_output_bias=${mixer.attn.has_bias}"],
                mixer__attn__has_bias=st.booleans(),
                layout__ffn__pattern=st.sampled_from(["moe", "dense moe"]),
                moe__has_normalized_weights=normalized,
                moe__top_k=top_k,
            )
        )
    ),
    "mixtral": Drawn(
        with_heads(lines([*ATTN, "mixer.attn.qk_norm=none"], mixer__attn__window=window, moe__top_k=top_k))
    ),
    "mistral": Drawn(
        with_heads(
            st.sampled_from(["attn", "swa"]).flatmap(
                lambda mixer: lines(
                    [*ATTN, "layout.ffn.pattern=dense", "mixer.attn.qk_norm=none", f"layout.pattern={mixer}"],
                    mixer__swa__window=st.sampled_from(["1", "9", "200"]),
                )
            )
        )
    ),
    "olmoe": Drawn(
        # Its head dim is always width over heads.
        lines(
            [*ATTN, "mixer.attn.qk_norm=all_heads", "mixer.attn.num_heads=4"],
            mixer__attn__num_key_heads=st.sampled_from([1, 2, 4]),
            mixer__attn__clip=st.sampled_from(["null", "0.3"]),
            moe__has_normalized_weights=normalized,
            moe__top_k=top_k,
        )
    ),
    "minimax_m2": Drawn(
        with_heads(
            lines(
                [*ATTN, "moe=sigmoid", *GQA, "mixer.attn.qk_norm=all_heads", "moe.weight_scale=1.0"],
                mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
                moe__top_k=top_k,
            )
        )
    ),
}
