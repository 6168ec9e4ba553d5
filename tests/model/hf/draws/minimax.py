"""MiniMax-Text-01."""

import json
import shutil
from copy import copy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.model.hf.draws import Drawn, lines, top_k, with_heads

HEADS = "${mixer.attn.num_heads}"
DIM = "${mixer.attn.head_dim}"


def open_partly_rotated(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers' model, which rotates as much of a head as rotary_dim says instead of all of it."""
    from tests.model.hf.test_families import open_theirs

    theirs, problems = open_theirs(directory)
    from transformers.models.minimax import modeling_minimax
    from transformers.models.minimax_m2.modeling_minimax_m2 import apply_rotary_pos_emb

    # The same rotation, of as many dims as there are angles for.
    modeling_minimax.apply_rotary_pos_emb = apply_rotary_pos_emb
    narrow = copy(theirs.config)
    narrow.head_dim = json.loads((directory / "config.json").read_text())["rotary_dim"]
    theirs.model.rotary_emb = modeling_minimax.MiniMaxRotaryEmbedding(narrow)
    for module in theirs.modules():
        if isinstance(module, modeling_minimax.MiniMaxLightningAttention):
            # The file holds them in float32.
            module.slope_rate = module.get_slope_rate()
            decays = module.decay_factors(module.slope_rate)
            module.query_decay, module.key_decay, module.diagonal_decay = decays
    return theirs, problems


def open_as_minimax(directory: Path) -> tuple[Any, dict[str, set[str]]]:
    """transformers knows the first release under another name."""
    renamed = directory.with_name("renamed")
    shutil.copytree(directory, renamed)
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps(config | {"model_type": "minimax"}))
    theirs, problems = open_partly_rotated(renamed)
    # Buffers that follow from the number of heads and the layer; the code of the first release has none.
    decays = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    problems["missing_keys"] = {name for name in problems["missing_keys"] if not name.endswith(decays)}
    return theirs, problems


drawn = with_heads(
    lines(
        [
            *("residual=scaled_post_norm", "moe=softmax", "layout.ffn.pattern=moe"),
            *("moe.shared_hidden=0", "moe.has_shared_gate=false"),
            *("mixer.attn.qk_norm=none", "mixer.attn.output_gate=none"),
            *(f"mixer.lightning.num_heads={HEADS}", f"mixer.lightning.key_dim={DIM}"),
            *(f"mixer.lightning.value_dim={DIM}", "mixer.lightning.decay_rank=16"),
        ],
        model__depth=st.sampled_from([2, 3]),
        layout__pattern=st.sampled_from(["lightning attn", "attn 2*lightning", "attn", "lightning"]),
        mixer__attn__rotary_dim=st.sampled_from([4, 8]),
        mixer__attn__head_dim=st.sampled_from([8, 12]),
        mixer__attn__window=st.sampled_from(["null", "9"]),
        residual__alpha=st.sampled_from([1.0, 3.5565588200778455]),
        residual__beta=st.sampled_from([1.0, 0.7]),
        moe__top_k=top_k,
    )
)
FAMILIES: dict[str, Drawn] = {
    "minimax": Drawn(drawn, open_partly_rotated),
    "minimax_text_01": Drawn(drawn, open_as_minimax),
    "minimax_m1": Drawn(drawn, open_as_minimax),
}
