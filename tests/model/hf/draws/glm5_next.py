"""GLM-5.3-Flash."""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k
from tests.model.hf.draws.kimi_linear import with_kda
from tests.model.hf.vision import open_beside_vision

VISION = {
    **{"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8},
    **{"out_hidden_size": 32, "projection_intermediate_size": 8, "patch_size": 2, "image_size": 4},
}


def open_theirs(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers' model of a nested directory."""
    theirs, problems = open_beside_vision(directory, "glm5_next", "Glm5NextForConditionalGeneration", VISION)
    missing = {name for name in problems["missing_keys"] if not name.startswith("model.visual")}
    return theirs, problems | {"missing_keys": missing}


FAMILIES: dict[str, Drawn] = {
    "glm5_next": Drawn(
        with_kda(
            lines(
                [
                    *("residual=hyper", "residual.has_learned_collapse=false", "moe=sigmoid"),
                    *("mixer.dsa_pooled.latent_eps=${residual.norm_eps}", "mixer.mla.rotary_dim=0"),
                    "mixer.dsa_pooled.index_dim=12",
                ],
                model__depth=st.sampled_from([1, 2]),
                layout__pattern=st.sampled_from(["kda dsa_pooled", "dsa_pooled kda", "dsa_pooled"]),
                layout__ffn__pattern=st.sampled_from(["moe", "dense moe", "moe dense"]),
                # The low limit cuts many gates and ups at this size.
                model__activation__limit=st.sampled_from([0.3, 10.0]),
                residual__streams=st.sampled_from([2, 4]),
                residual__iterations=st.sampled_from([3, 20]),
                mixer__kda__decay=st.sampled_from(["bounded_sigmoid", "softplus"]),
                mixer__kda__num_heads=st.sampled_from([1, 3]),
                mixer__dsa_pooled__num_heads=st.sampled_from([1, 3]),
                # With few heads many scores are all exactly zero.
                mixer__dsa_pooled__index_heads=st.sampled_from([16, 24]),
                mixer__dsa_pooled__index_pool=st.sampled_from([2, 4]),
                mixer__dsa_pooled__top_k=st.sampled_from([4, 12, 100]),
                moe__num_groups=st.sampled_from([1, 2]),
                moe__shared_hidden=st.sampled_from([16, 32]),
                moe__weight_scale=st.sampled_from([1.0, 2.5]),
                moe__top_k=top_k,
            )
        ),
        open_theirs,
    ),
}
