"""Qwen3.5, its text model alone and inside the whole one."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads


def text(ffn: str, **drawn: st.SearchStrategy) -> Drawn:
    """Layers that all have experts, or are all dense."""
    return Drawn(
        with_heads(
            lines(
                ["moe=softmax", "residual=pre_norm", f"layout.ffn.pattern={ffn}", "model.depth=2"],
                layout__pattern=st.sampled_from(["gdn attn", "attn gdn", "attn", "gdn"]),
                model__has_tied_embeddings=st.booleans(),
                mixer__attn__rotary_dim=st.sampled_from([2, 4, 8]),
                mixer__gdn__num_key_heads=st.sampled_from([1, 2, 4]),
                mixer__gdn__key_dim=st.sampled_from([8, 12]),
                **drawn,
            )
        )
    )


SPARSE = text("moe", moe__top_k=top_k, moe__shared_hidden=st.sampled_from([8, 16]))
DENSE = text("dense")
FAMILIES: dict[str, Drawn] = {
    "qwen3_5_moe_text": SPARSE,
    "qwen3_5_moe": SPARSE,
    "qwen3_5_text": DENSE,
    "qwen3_5": DENSE,
}
