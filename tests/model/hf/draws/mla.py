"""Latent attention: DeepSeek-V2 and -V3, Kimi K2, GLM-4.7-Flash."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k

PLAIN = ["residual=pre_norm", "residual.has_zero_centered_norm=false"]
SIGMOID = ["moe=sigmoid", *PLAIN, "moe.shared_hidden=16"]
YARN = [
    *("factor=4.0", "original_context=16", "beta_fast=4.0", "mscale=0.7", "mscale_all_dim=0.9"),
    *("kind=yarn",),
]
groups = st.sampled_from([(1, 1), (4, 3), (2, 2), (4, 2)])
queries = st.sampled_from(["12", "null"])


def scaled(strategy: st.SearchStrategy[list[str]], mixer: str = "mla") -> st.SearchStrategy[list[str]]:
    """With a rotary that is stretched or not, and routing over groups or not."""
    stretch = [f"mixer.{mixer}.rotary_scaling.{line}" for line in YARN]
    return st.tuples(strategy, st.booleans(), groups).map(
        lambda drawn: [
            *drawn[0],
            *(stretch if drawn[1] else []),
            f"moe.num_groups={drawn[2][0]}",
            f"moe.kept_groups={drawn[2][1]}",
        ]
    )


VISION = {
    **{"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16},
    **{"pos_emb_height": 4, "pos_emb_width": 4},
}


def open_kimi_k25(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """The whole model, with a small vision tower that it draws itself."""
    from transformers import Kimi_K25ForConditionalGeneration

    whole = directory.with_name("whole")
    shutil.copytree(directory, whole)
    config = json.loads((whole / "config.json").read_text())
    config |= {"vision_config": VISION, "projection_hidden_size": 16}
    (whole / "config.json").write_text(json.dumps(config))
    opened: Any = Kimi_K25ForConditionalGeneration.from_pretrained(
        whole,
        dtype=torch.get_default_dtype(),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    model, info = opened
    problems = {key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    drawn = {name for name in problems["missing_keys"] if re.search("vision_tower|mm_projector", name)}
    problems["missing_keys"] -= drawn
    return model.eval(), problems


def open_as_v3(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers knows the architecture by one name only."""
    from tests.model.hf.test_families import open_theirs

    renamed = directory.with_name("renamed")
    shutil.copytree(directory, renamed)
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    return open_theirs(renamed)


def latent(*more: str, **drawn: st.SearchStrategy) -> st.SearchStrategy[list[str]]:
    """Latent attention in every layer."""
    layouts = st.sampled_from(["", "dense", "2*dense"])
    return scaled(
        lines(
            ["layout=mla", *SIGMOID, "mixer.mla.shared_key_dim=8", "mixer.dsa.index_dim=8", *more],
            **({"layout__ffn__first": layouts, "mixer__mla__num_heads": st.sampled_from([1, 3, 4])} | drawn),
            mixer__mla__value_dim=st.sampled_from([5, 8]),
            moe__top_k=top_k,
            model__depth=st.sampled_from([2, 3]),
        )
    )


FAMILIES: dict[str, Drawn] = {
    "deepseek_v3": Drawn(
        latent(
            mixer__mla__query_latent_dim=queries,
            mixer__mla__rotary_layout=st.sampled_from(["interleaved", "half_split"]),
            moe__shared_hidden=st.sampled_from([16, 32]),
            moe__has_normalized_weights=st.booleans(),
        )
    ),
    "kimi_k2": Drawn(
        latent(
            moe__weight_scale=st.sampled_from([1.0, 2.827]),
            # Its one bound for both is the other one drawn.
            mixer__mla__rotary_scaling__beta_slow=st.sampled_from([1.0, 4.0]),
        ),
        open_as_v3,
    ),
    "kimi_k25": Drawn(latent(moe__weight_scale=st.sampled_from([1.0, 2.827])), open_kimi_k25),
    "deepseek_v2": Drawn(
        latent(
            *("moe=softmax", "moe.has_shared_gate=false", "moe.has_normalized_weights=false"),
            *("moe.num_experts=8", "moe.hidden=16", "moe.shared_hidden=32"),
            # transformers refuses widths that are no multiple of the heads.
            mixer__mla__num_heads=st.sampled_from([1, 2, 4]),
            mixer__mla__query_latent_dim=queries,
            moe__weight_scale=st.sampled_from([1.0, 16.0]),
        )
    ),
    "glm4_moe_lite": Drawn(
        latent(layout__ffn__pattern=st.sampled_from(["moe", "dense moe"]), layout__ffn__first=st.just("")),
    ),
}
