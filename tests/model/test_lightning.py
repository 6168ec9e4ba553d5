"""Equal to transformers' MiniMax lightning layer, and to the other forms' sums over pairs written out."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid, silu

from model.mixer import Sequence
from model.mixers.lightning import Lightning, LightningConfig
from tests.architectures import randomise, small_architecture
from tests.closeness import SAME, assert_close, in_float64
from tests.layers import assert_same_layer

pytestmark = pytest.mark.filterwarnings("ignore")


def config_of(**fields: object) -> LightningConfig:
    config = small_architecture([f"mixer.lightning.{name}={value}" for name, value in fields.items()])
    lightning = config.mixer["lightning"]
    assert isinstance(lightning, LightningConfig)
    return lightning


def import_lightning(theirs: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Their tensors in our names and layout; theirs puts the q, k and v of a head side by side."""
    parts = theirs["qkv_proj.weight"].unflatten(0, (heads, 3, -1)).unbind(1)
    inner = [*(part.flatten(0, 1) for part in parts), theirs["output_gate.weight"]]
    return {
        "in_proj.weight": torch.cat(inner),
        "out_norm.weight": theirs["norm.weight"],
        "out_proj.weight": theirs["out_proj.weight"],
    }


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
@given(
    tokens=st.integers(1, 150),
    heads=st.integers(1, 3),
    layer_of_depth=st.sampled_from([(0, 1), (0, 4), (2, 4), (3, 4)]),
    seed=st.integers(0, 2**20),
)
def test_layer_equals_theirs(tokens: int, heads: int, layer_of_depth: tuple[int, int], seed: int) -> None:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    torch.manual_seed(seed)
    layer, depth = layer_of_depth
    config = config_of(num_heads=heads, value_dim=8)
    theirs_config = MiniMaxConfig(
        hidden_size=32,
        num_attention_heads=heads,
        head_dim=config.key_dim,
        num_hidden_layers=depth,
        layer_types=["linear_attention"] * depth,
        block_size=16,
    )
    with in_float64():
        theirs = MiniMaxLightningAttention(theirs_config, layer)
    assert_same_layer(
        config.build(32, layer, depth, 0.02),
        theirs,
        lambda x: theirs(x, None, None)[0],
        partial(import_lightning, heads=heads),
        width=32,
        tokens=tokens,
    )


def sum_over_pairs(
    mixer: Lightning, w: Mapping[str, Tensor], x: Tensor, document: Tensor, position: Tensor
) -> Tensor:
    """The layer from its equations: every token weighs the values of every earlier one of its document."""
    c = mixer.config
    heads, keys, values = c.num_heads, c.num_heads * c.key_dim, c.num_heads * c.value_dim
    gate_size = 0 if c.output_gate == "none" else values
    mixed = x @ w["in_proj.weight"].T
    q, k, v = mixed[..., : 2 * keys + values].split([keys, keys, values], dim=-1)
    gate, rate = mixed[..., 2 * keys + values :].split([gate_size, heads * (c.decay == "learned")], dim=-1)
    q, k, v = (silu(part) if c.has_silu else part for part in (q, k, v))
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    if c.rotary_dim:
        q, k = (turned(part, position, c.rotary_dim, c.rotary_theta) for part in (q, k))
    if c.has_scale:
        q = q / c.key_dim**0.5
    if c.decay == "retnet":
        log_decay = torch.tensor([1 - 2 ** (-5.0 - h) for h in range(heads)], dtype=x.dtype).log()
        log_decay = log_decay[:, None].expand(*x.shape[:2], heads, c.key_dim)
    elif c.decay == "learned":
        log_decay = logsigmoid(rate + w["decay.bias"])[..., None].expand(*x.shape[:2], heads, c.key_dim)
        log_decay = log_decay / c.decay_temper
    else:
        thin = x @ w["decay_down_proj.weight"].T @ w["decay_up_proj.weight"].T + w["decay.bias"]
        log_decay = (logsigmoid(thin) / c.decay_temper).unflatten(-1, (heads, -1))
    total = log_decay.cumsum(1)
    factor = (total[:, :, None] - total[:, None]).exp()
    is_seen = (document[:, :, None] == document[:, None]).tril()[..., None]
    scores = torch.einsum("bthk,bshk,btshk->btsh", q, k, factor) * is_seen
    out = torch.einsum("btsh,bshv->bthv", scores, v)
    out = out.flatten(-2) if c.norm == "all_heads" else out
    out = out / (out.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w["out_norm.weight"]
    out = out.reshape(*x.shape[:2], -1)
    if c.output_gate != "none":
        out = out * (gate.sigmoid() if c.output_gate == "sigmoid" else gate * gate.sigmoid())
    return out @ w["out_proj.weight"].T


def turned(x: Tensor, position: Tensor, dim: int, theta: float) -> Tensor:
    """Pairs (m, m + dim / 2) as complex numbers times exp(i position theta^(-2 m / dim))."""
    pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 : dim])
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angles = position[..., None, None] * theta**-exponents
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag, x[..., dim:]], dim=-1)


FORMS = {
    "retnet": {"decay": "retnet", "rotary_dim": 8, "has_scale": "true", "has_silu": "false"},
    "simple_gla": {"decay": "learned", "has_scale": "true", "has_silu": "false"},
    "gla": {"decay": "channel", "has_scale": "true", "has_silu": "false", "decay_temper": 2.0},
    "partly_rotated": {"decay": "learned", "rotary_dim": 4, "has_silu": "true", "norm": "all_heads"},
    "ungated": {"decay": "channel", "output_gate": "none", "norm": "all_heads"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("starts", [0.0, 0.1])
def test_other_forms_equal_the_sum_over_pairs(form: str, starts: float) -> None:
    config = config_of(**{"norm": "per_head", "output_gate": "silu", **FORMS[form]})
    mixer = config.build(32, 1, 4, 0.02).double()
    randomise(mixer)
    tokens = 75
    document = (torch.rand(2, tokens) < starts).long().cumsum(1)
    is_start = torch.nn.functional.pad(document.diff(dim=1) != 0, (1, 0), value=True)
    index = torch.arange(tokens).expand(2, -1)
    position = index - torch.where(is_start, index, 0).cummax(1).values
    x = torch.randn(2, tokens, 32, dtype=torch.float64, requires_grad=True)
    weights = dict(mixer.named_parameters())
    with in_float64():
        out = mixer(x, Sequence(position, document, index))
    reference = sum_over_pairs(mixer, weights, x, document, position)
    weight = torch.randn_like(out)
    leaves = [x, *weights.values()]
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    expected = torch.autograd.grad((reference * weight).sum(), leaves)
    assert_close([out, *grads], [reference, *expected], SAME)


def test_prediction_modules_decay_like_the_last_layer() -> None:
    config, x = config_of(), torch.randn(1, 50, 32)
    last, mtp = config.build(32, 3, 4, 0.02), config.build(32, 5, 4, 0.02)
    randomise(last)
    mtp.load_state_dict(last.state_dict())
    sequence = Sequence.whole(torch.zeros(1, 50, dtype=torch.long))
    assert torch.equal(last(x, sequence), mtp(x, sequence))
