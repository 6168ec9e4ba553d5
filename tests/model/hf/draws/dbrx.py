"""DBRX."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k

PLAIN = [
    *("moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false", "residual.norm=layer"),
    *("residual.norm_eps=0.00001", "layout=attn", "mixer.attn.qk_norm=none", "mixer.attn.output_gate=none"),
    *(
        "moe.shared_hidden=0",
        "moe.has_shared_gate=false",
        "mixer.attn.num_heads=4",
        "mixer.attn.rotary_dim=8",
    ),
]

FAMILIES: dict[str, Drawn] = {
    "dbrx": Drawn(
        # Its head dim is always width over heads; transformers cannot run it without clipping.
        lines(
            PLAIN,
            mixer__attn__num_key_heads=st.sampled_from([1, 2, 4]),
            mixer__attn__clip=st.sampled_from(["0.3", "8.0"]),
            mixer__attn__rotary_theta=st.sampled_from(["10000.0", "500000.0"]),
            moe__has_normalized_weights=st.booleans(),
            moe__top_k=top_k,
        )
    ),
}
