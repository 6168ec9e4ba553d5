"""LongCat-Flash."""

import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.hf.families.longcat import surplus
from model.hf.pretrained import load_pretrained
from tests.model.hf.draws import Drawn, lines
from tests.model.hf.draws.mla import YARN

MODEL = [
    *("layout=longcat_flash", "moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("moe.shared_hidden=0", "moe.has_shared_gate=false", "moe.has_normalized_weights=false"),
    *("mixer.mla.has_latent_scale=true", "mixer.mla.shared_key_dim=8", "mixer.dsa.index_dim=8"),
]


def open_padded(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers asks for first projections of experts that have none; these are never read."""
    from tests.model.hf.test_families import open_theirs

    padded = directory.with_name("padded")
    shutil.copytree(directory, padded)
    model = load_pretrained(directory)
    moe = model.config.moe
    blank = torch.zeros(moe.hidden, model.config.model.width)
    tensors = load_file(padded / "model.safetensors")
    tensors |= {name: blank.clone() for name in surplus(model.config)}
    save_file(tensors, padded / "model.safetensors", metadata={"format": "pt"})
    return open_theirs(padded)


FAMILIES: dict[str, Drawn] = {
    "longcat_flash": Drawn(
        st.tuples(
            lines(
                MODEL,
                model__depth=st.sampled_from([2, 4]),
                mixer__mla__num_heads=st.sampled_from([1, 3, 4]),
                mixer__mla__query_latent_dim=st.sampled_from([12, 24]),
                moe__num_zero_experts=st.sampled_from([0, 1, 4]),
                # transformers fails with one expert per token.
                moe__top_k=st.integers(2, 5),
                moe__weight_scale=st.sampled_from([1.0, 6.0]),
            ),
            st.booleans(),
        ).map(
            lambda drawn: (
                drawn[0] + [f"mixer.mla.rotary_scaling.{line}" for line in YARN] if drawn[1] else drawn[0]
            )
        ),
        open_padded,
    ),
}
