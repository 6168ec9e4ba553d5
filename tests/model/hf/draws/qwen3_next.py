"""Qwen3-Next."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads

FAMILIES: dict[str, Drawn] = {
    "qwen3_next": Drawn(
        with_heads(
            lines(
                ["moe=softmax", "residual=pre_norm"],
                layout__pattern=st.sampled_from(["3*gdn attn", "gdn attn", "attn", "2*gdn"]),
                layout__ffn__pattern=st.sampled_from(["moe", "moe dense"]),
                mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
                mixer__gdn__num_key_heads=st.sampled_from([1, 2, 4]),
                mixer__gdn__key_dim=st.sampled_from([8, 12]),
                moe__top_k=top_k,
            )
        )
    ),
}
