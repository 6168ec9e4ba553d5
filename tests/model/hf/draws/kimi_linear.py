"""Kimi-Linear."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k


def with_kda(strategy: st.SearchStrategy[list[str]]) -> st.SearchStrategy[list[str]]:
    """With linear attention whose dims and ranks are all one, as theirs."""
    names = ("key_dim", "value_dim", "decay_rank", "gate_rank")
    # Outputs of a few dims are often nearly zero; with a small eps their norm would blow rounding up.
    return st.tuples(strategy, st.sampled_from([6, 8]), st.sampled_from([0.001, 0.01])).map(
        lambda drawn: [
            *(*drawn[0], f"residual.norm_eps={drawn[2]}"),
            *(f"mixer.kda.{name}={drawn[1]}" for name in names),
        ]
    )


FAMILIES: dict[str, Drawn] = {
    "kimi_linear": Drawn(
        with_kda(
            lines(
                [
                    *("residual=pre_norm", "residual.has_zero_centered_norm=false", "moe=sigmoid"),
                    "mixer.mla.rotary_dim=0",
                ],
                model__depth=st.sampled_from([2, 3]),
                layout__pattern=st.sampled_from(["kda mla", "2*kda mla", "mla", "kda"]),
                layout__ffn__pattern=st.sampled_from(["moe", "dense moe", "moe dense"]),
                mixer__kda__num_heads=st.sampled_from([1, 3]),
                mixer__kda__conv_width=st.sampled_from([2, 4]),
                mixer__mla__query_latent_dim=st.sampled_from(["12", "null"]),
                mixer__mla__shared_key_dim=st.sampled_from([3, 4]),
                moe__num_groups=st.sampled_from([1, 2]),
                moe__shared_hidden=st.sampled_from([16, 32]),
                moe__weight_scale=st.sampled_from([1.0, 2.446]),
                moe__has_normalized_weights=st.booleans(),
                moe__top_k=top_k,
            )
        )
    ),
}
