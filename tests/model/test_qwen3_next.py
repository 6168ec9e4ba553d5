"""Equal to transformers' Qwen3-Next where a whole model would hide it: one layer, and the loss."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.peers import as_transformers
from model.hf.families.qwen3_next import gdn_pieces
from model.hf.pieces import Mapped
from model.language_model import LanguageModel
from model.mixers.gdn import GdnConfig
from tests.architectures import random_model, small_architecture
from tests.closeness import SAME, in_float64, relative
from tests.layers import assert_same_layer

pytestmark = pytest.mark.filterwarnings("ignore")


def pair(overrides: list[str]) -> tuple[LanguageModel, Any]:
    """Our model, float32, and theirs, float64."""
    config = small_architecture(["residual.norm_eps=1e-6", *overrides])
    ours = random_model(config, torch.float32)
    for router in ours.routers():
        router.bias.zero_()
    with in_float64():
        theirs = as_transformers(ours, "qwen3_next").double()
    theirs.set_experts_implementation("eager")  # the others take no float64
    return ours, theirs


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(
    tokens=st.integers(1, 100),
    key_heads=st.sampled_from([1, 2, 3]),
    repeat=st.sampled_from([1, 2]),
    dims=st.sampled_from([(8, 12), (16, 16), (12, 8)]),
    seed=st.integers(0, 2**20),
)
def test_gdn_layer_equals_theirs(tokens: int, key_heads: int, repeat: int, dims, seed: int) -> None:
    torch.manual_seed(seed)
    fields = {
        "num_key_heads": key_heads,
        "num_value_heads": key_heads * repeat,
        "key_dim": dims[0],
        "value_dim": dims[1],
    }
    overrides = [f"mixer.gdn.{name}={value}" for name, value in fields.items()]
    ours, theirs = pair([*overrides, "model.depth=1", "layout=gdn"])
    layer, mixer, gdn = theirs.model.layers[0].linear_attn, ours.blocks[0].mixer, ours.config.mixer["gdn"]
    assert isinstance(gdn, GdnConfig)
    width, parameters = ours.config.model.width, dict(mixer.named_parameters())
    mapped = Mapped(gdn_pieces("", "", gdn, width), parameters)

    def weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        for name, x in theirs.items():
            mapped.read(name, x, found)
        return found

    assert_same_layer(mixer, layer, layer, weights, width=width, tokens=tokens)


def test_loss_equals_theirs() -> None:
    ours, theirs = pair([])
    ids = torch.randint(ours.config.model.vocab_size, (2, 50))
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    exact = deepcopy(ours).double()
    exact.dtype = torch.float64
    with in_float64():
        reference = theirs(ids, labels=ids).loss
        loss = exact.loss(ids, targets).cross_entropy / 98
    assert relative(loss.detach(), reference.detach()) < SAME
