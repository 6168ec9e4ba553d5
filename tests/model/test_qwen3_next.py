"""Equal to transformers' Qwen3-Next, layer by layer and as a whole, with random weights."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bench.peers import build_qwen3_next
from model.hf.qwen3_next import import_gdn, import_weights
from model.language_model import LanguageModel
from model.mixer import Sequence
from model.mixers.gdn import GdnConfig
from tests.architectures import randomise, small_architecture
from tests.closeness import assert_close, relative

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 2e-5


def pair(overrides: list[str]):
    config = small_architecture(["residual.norm_eps=1e-6", *overrides])
    theirs = build_qwen3_next(config)
    randomise(theirs, with_buffers=False)  # theirs keep the rotary frequencies
    ours = LanguageModel(config)
    ours.load_state_dict(import_weights(theirs.state_dict(), config))
    return config, ours, theirs


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
    config, ours, theirs = pair([*overrides, "model.depth=1", "layout=gdn"])
    layer, mixer = theirs.model.layers[0].linear_attn, ours.blocks[0].mixer
    x = torch.randn(2, tokens, config.model.width)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, reference = mixer(ours_x, Sequence.whole(x[..., 0])), layer(theirs_x)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (reference * weight).sum().backward()
    assert_close([out, ours_x.grad], [reference, theirs_x.grad], LIMIT)
    gdn = config.mixer["gdn"]
    assert isinstance(gdn, GdnConfig)
    theirs_grads = {f"linear_attn.{name}": p.grad for name, p in layer.named_parameters()}
    expected = import_gdn(theirs_grads, gdn)
    for name, parameter in mixer.named_parameters():
        assert relative(parameter.grad, expected[name]) < LIMIT, name


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(
    tokens=st.integers(2, 80),
    heads=st.sampled_from([(4, 2), (2, 1), (6, 3)]),
    rotary=st.sampled_from([2, 4, 8]),
    top_k=st.integers(2, 4),  # with one expert the normalised weight is 1 and the router has no gradient
    pattern=st.sampled_from(["3*gdn attn", "gdn attn", "attn", "2*gdn"]),
    seed=st.integers(0, 2**20),
)
def test_model_equals_theirs(tokens, heads, rotary, top_k, pattern, seed) -> None:
    torch.manual_seed(seed)
    config, ours, theirs = pair(
        [
            f"mixer.attn.num_heads={heads[0]}",
            f"mixer.attn.num_key_heads={heads[1]}",
            f"mixer.attn.rotary_dim={rotary}",
            f"moe.top_k={top_k}",
            f"layout.pattern={pattern}",
        ]
    )
    ids = torch.randint(config.model.vocab_size, (2, tokens))
    logits, reference = ours(ids), theirs(ids).logits
    assert relative(logits, reference) < LIMIT
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (reference * weight).sum().backward()
    expected = import_weights({name: p.grad for name, p in theirs.named_parameters()}, config)
    for name, parameter in ours.named_parameters():
        # An expert that no token chose has a zero gradient here and there.
        assert relative(parameter.grad, expected[name]) < 1e-4, name


def test_loss_equals_theirs() -> None:
    config, ours, theirs = pair([])
    ids = torch.randint(config.model.vocab_size, (2, 50))
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    reference = theirs(ids, labels=ids).loss
    loss = ours.loss(ids, targets).cross_entropy / 98
    assert relative(loss.detach(), reference.detach()) < LIMIT
