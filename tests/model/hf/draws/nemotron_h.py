"""Nemotron-H."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads

LAYOUTS = [
    ("mamba2 none attn none", "none moe none dense"),
    ("mamba2 none", "none moe"),
    ("none attn", "dense none"),
    ("mamba2 mamba2 none", "none none moe"),
]


def with_layout(strategy: st.SearchStrategy[list[str]]) -> st.SearchStrategy[list[str]]:
    """With blocks of one half each."""
    return st.tuples(strategy, st.sampled_from(LAYOUTS)).map(
        lambda pair: [*pair[0], f"layout.pattern={pair[1][0]}", f"layout.ffn.pattern={pair[1][1]}"]
    )


FAMILIES: dict[str, Drawn] = {
    "nemotron_h": Drawn(
        with_layout(
            with_heads(
                lines(
                    [
                        *("residual=pre_norm", "residual.has_zero_centered_norm=false", "moe=sigmoid"),
                        *("model.activation.kind=relu2", "mixer.attn.rotary_dim=0"),
                        *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none"),
                    ],
                    mixer__mamba2__num_key_heads=st.sampled_from([1, 2, 4]),
                    mixer__mamba2__has_conv_bias=st.booleans(),
                    mixer__mamba2__conv_width=st.sampled_from([2, 4]),
                    mixer__mamba2__value_dim=st.sampled_from([8, 12]),
                    moe__num_groups=st.sampled_from([1, 2]),
                    moe__shared_hidden=st.sampled_from([8, 16]),
                    moe__has_normalized_weights=st.booleans(),
                    moe__weight_scale=st.sampled_from([1.0, 2.5]),
                    moe__top_k=top_k,
                )
            )
        )
    ),
}
