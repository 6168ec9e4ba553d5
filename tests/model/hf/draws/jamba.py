"""Jamba."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k

FAMILIES: dict[str, Drawn] = {
    "jamba": Drawn(
        # Its head dim is always width over heads, and one size is that of every feed-forward.
        lines(
            [
                *("residual=pre_norm", "residual.has_zero_centered_norm=false", "moe=softmax"),
                *("moe.has_normalized_weights=false", "moe.shared_hidden=0", "moe.has_shared_gate=false"),
                *("mixer.attn.rotary_dim=0", "mixer.attn.qk_norm=none", "mixer.attn.output_gate=none"),
                *("mixer.attn.num_heads=4", "moe.hidden=16", "model.ffn_hidden=16"),
            ],
            model__depth=st.sampled_from([2, 3]),
            model__has_tied_embeddings=st.booleans(),
            layout__pattern=st.sampled_from(["mamba attn mamba", "mamba attn", "attn", "mamba"]),
            layout__ffn__pattern=st.sampled_from(["dense moe", "moe", "dense", "moe 2*dense"]),
            mixer__attn__num_key_heads=st.sampled_from([1, 2, 4]),
            mixer__mamba__num_channels=st.sampled_from([32, 64]),
            mixer__mamba__has_conv_bias=st.booleans(),
            mixer__mamba__conv_width=st.sampled_from([2, 4]),
            mixer__mamba__dt_rank=st.sampled_from([2, 6]),
            moe__top_k=top_k,
        )
    ),
}
