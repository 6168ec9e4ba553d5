"""Latent attention over chosen keys: DeepSeek-V3.2 and GLM-5."""

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k
from tests.model.hf.draws.mla import SIGMOID, scaled


def sparse(*more: str, **drawn: st.SearchStrategy) -> st.SearchStrategy[list[str]]:
    """Latent attention over chosen keys. Many index heads: with few, many scores are all exactly zero."""
    return scaled(
        lines(
            ["layout=dsa", *SIGMOID, "mixer.dsa.index_dim=12", "mixer.dsa_pooled.index_pool=1", *more],
            **drawn,
            mixer__dsa__index_heads=st.sampled_from([16, 24]),
            mixer__dsa__top_k=st.sampled_from([1, 4, 12, 100]),
            moe__top_k=top_k,
        ),
        "dsa",
    )


FAMILIES: dict[str, Drawn] = {
    "deepseek_v32": Drawn(
        sparse("model.depth=2", layout__ffn__first=st.sampled_from(["", "dense"])),
    ),
    "glm_moe_dsa": Drawn(
        sparse(
            *("model.depth=3", "mixer.dsa.index_rotary_layout=interleaved"),
            layout__pattern=st.sampled_from(["dsa", "dsa 2*dsa_shared", "dsa dsa_shared"]),
            layout__ffn__pattern=st.sampled_from(["moe", "dense moe"]),
        )
    ),
}
