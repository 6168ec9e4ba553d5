"""Qwen3.5, its text model alone and inside the whole one."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads

TEXT = Drawn(
    with_heads(
        lines(
            ["moe=softmax", "residual=pre_norm", "layout.ffn.pattern=moe", "model.depth=2"],
            layout__pattern=st.sampled_from(["gdn attn", "attn gdn", "attn", "gdn"]),
            model__has_tied_embeddings=st.booleans(),
            mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
            mixer__gdn__num_key_heads=st.sampled_from([1, 2, 4]),
            mixer__gdn__key_dim=st.sampled_from([8, 12]),
            moe__top_k=top_k,
            moe__shared_hidden=st.sampled_from([8, 16]),
        )
    )
)
FAMILIES: dict[str, Drawn] = {"qwen3_5_moe_text": TEXT, "qwen3_5_moe": TEXT}
