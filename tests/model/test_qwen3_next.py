"""Equal to transformers' Qwen3-Next where a whole model would hide it: one layer, and the loss."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bench.peers import as_transformers
from model.hf.families.qwen3_next import gdn_pieces
from model.hf.pieces import Mapped
from model.language_model import LanguageModel
from model.mixer import Sequence
from model.mixers.gdn import GdnConfig
from tests.architectures import random_model, small_architecture
from tests.closeness import assert_close, relative

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 2e-5


def pair(overrides: list[str]) -> tuple[LanguageModel, Any]:
    config = small_architecture(["residual.norm_eps=1e-6", *overrides])
    ours = random_model(config, torch.float32)
    for router in ours.routers():
        router.bias.zero_()
    return ours, as_transformers(ours, "qwen3_next")


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
    width = ours.config.model.width
    x = torch.randn(2, tokens, width)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ids = torch.zeros(2, tokens, dtype=torch.long)
    out, reference = mixer(ours_x, Sequence.whole(ids)), layer(theirs_x)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (reference * weight).sum().backward()
    assert_close([out, ours_x.grad], [reference, theirs_x.grad], LIMIT)
    parameters = dict(mixer.named_parameters())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    mapped = Mapped(gdn_pieces("", "", gdn, width), parameters)
    for name, parameter in layer.named_parameters():
        mapped.read(name, parameter.grad, expected)
    for name, parameter in parameters.items():
        assert relative(parameter.grad, expected[name]) < LIMIT, name


def test_loss_equals_theirs() -> None:
    ours, theirs = pair([])
    ids = torch.randint(ours.config.model.vocab_size, (2, 50))
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    reference = theirs(ids, labels=ids).loss
    loss = ours.loss(ids, targets).cross_entropy / 98
    assert relative(loss.detach(), reference.detach()) < LIMIT
