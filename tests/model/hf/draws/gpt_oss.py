"""gpt-oss."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads

PLAIN = [
    *("moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false", "residual.norm_eps=1e-5"),
    *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none", "mixer.attn.has_sinks=true"),
    *(
        "mixer.attn.rotary_dim=8",
        "mixer.attn.has_output_bias=${mixer.attn.has_bias}",
        "layout.ffn.pattern=moe",
    ),
    *("moe.activation.kind=shifted_swiglu", "moe.activation.clamps_product=false"),
    *("moe.activation.limit_from=0", "moe.has_bias=true", "moe.has_router_bias=true"),
    *("moe.score=softmax_of_chosen", "moe.shared_hidden=0", "moe.has_shared_gate=false"),
    "layout.ffn.pattern=moe",
]
YARN = ["kind=yarn", "factor=32.0", "original_context=8", "truncates=false"]
rotary = st.sampled_from([[], [f"mixer.attn.rotary_scaling.{line}" for line in YARN]])

FAMILIES: dict[str, Drawn] = {
    "gpt_oss": Drawn(
        st.tuples(
            with_heads(
                lines(
                    PLAIN,
                    layout__pattern=st.sampled_from(["swa attn", "attn 2*swa", "attn"]),
                    mixer__attn__has_bias=st.booleans(),
                    mixer__swa__window=st.sampled_from([1, 7, 100]),
                    # The low limit cuts many gates and ups at this size.
                    moe__activation__limit=st.sampled_from([0.3, 7.0]),
                    moe__top_k=top_k,
                )
            ),
            rotary,
        ).map(lambda pair: [*pair[0], *pair[1]])
    ),
}
