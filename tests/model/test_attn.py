"""Equal to transformers' attention of every system that is a setting of ours, with random weights."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.rotary import rotate
from model.mixer import Sequence
from model.mixers.attn import AttnConfig
from model.rotary import RotaryScaling
from tests.layers import FULL, SLIDING, Theirs, assert_same_layer, entry

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, TOKENS = 32, 45


def attn(**fields: Any) -> AttnConfig:
    """A plain attention of the sizes of their layers, and what is set."""
    plain = {"rotary_dim": 8, "rotary_theta": 10000.0, "qk_norm": "none", "output_gate": "none"}
    plain |= {"num_heads": 4, "num_key_heads": 2, "head_dim": 8, "value_dim": 8}
    return entry("attn", **(plain | {"norm_eps": 1e-5, "has_zero_centered_norm": False} | fields))


def import_qkv(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their separate projections as our fused one."""
    ours = {}
    for part in ("weight", "bias"):
        rows = [theirs.get(f"{name}_proj.{part}") for name in ("q", "g", "k", "v")]
        if rows[0] is not None:
            ours[f"in_proj.{part}"] = torch.cat([row for row in rows if row is not None])
        if f"o_proj.{part}" in theirs:
            ours[f"out_proj.{part}"] = theirs[f"o_proj.{part}"]
    small = ("q_norm.weight", "k_norm.weight", "sinks")
    return ours | {name: theirs[name] for name in small if name in theirs}


def compare(config: AttnConfig, theirs: Theirs, index: int, mask: str, *rope: object) -> None:
    layer = theirs.layer(index)
    ours = config.build(WIDTH, index, 2, 0.02)
    assert_same_layer(ours, layer, theirs.run(layer, mask, *rope), import_qkv, width=WIDTH, tokens=TOKENS)


BOTH = ["sliding_attention", "full_attention"]


def test_mistral() -> None:
    theirs = Theirs("mistral", "Mistral", sliding_window=7)
    compare(attn(window=7), theirs, 0, SLIDING)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("truncates", [False, True])
def test_gpt_oss(index: int, truncates: bool) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "truncate": truncates}
    yarn |= {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64}
    fields = {"layer_types": BOTH, "sliding_window": 9, "rope_parameters": yarn, "attention_bias": True}
    theirs = Theirs("gpt_oss", "GptOss", **fields)
    scaling = {"kind": "yarn", "factor": 32.0, "original_context": 64, "truncates": truncates}
    config = attn(
        window=(9, None)[index],
        has_sinks=True,
        has_bias=True,
        has_output_bias=True,
        rotary_theta=150000.0,
        rotary_scaling=scaling,
    )
    compare(config, theirs, index, (SLIDING, FULL)[index])


@pytest.mark.parametrize("index", [0, 1])
def test_mimo_v2_flash(index: int) -> None:
    rope = {"rope_type": "default", "partial_rotary_factor": 0.334}
    ropes = {"sliding_attention": rope | {"rope_theta": 1e4}, "full_attention": rope | {"rope_theta": 5e6}}
    fields = {"layer_types": BOTH, "sliding_window": 6, "rope_parameters": ropes, "num_key_value_heads": 1}
    sizes = {"head_dim": 12, "v_head_dim": 8, "attention_value_scale": 0.707}
    theirs = Theirs("mimo_v2_flash", "MiMoV2Flash", **fields, **sizes)
    config = attn(
        num_key_heads=(2, 1)[index],
        head_dim=12,
        value_dim=8,
        window=(6, None)[index],
        has_sinks=index == 0,
        value_scale=0.707,
        rotary_dim=4,
        rotary_theta=(1e4, 5e6)[index],
    )
    compare(config, theirs, index, (SLIDING, FULL)[index], BOTH[index])


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_llama4(index: int, has_norm: bool, is_scaled: bool) -> None:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 500000.0}
    scaling = {}
    if is_scaled:
        rope |= {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 64}
        scaling = {"kind": "llama3", "factor": 16.0, "original_context": 64}
    fields = {"use_qk_norm": has_norm, "no_rope_layers": [1, 0], "attention_chunk_size": 8, "floor_scale": 11}
    fields |= {"attn_temperature_tuning": True, "attn_scale": 0.1, "rope_parameters": rope}
    fields |= {"layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2}
    theirs = Theirs("llama4", "Llama4", "Text", **fields)
    chunked = attn(
        chunk=8,
        rotary_theta=500000.0,
        rotary_layout="interleaved",
        rotary_scaling=scaling,
        qk_norm="weightless" if has_norm else "none",
    )
    nope = attn(rotary_dim=0, temperature=0.1, temperature_interval=11)
    compare((chunked, nope)[index], theirs, index, ("create_chunked_causal_mask", FULL)[index])


@pytest.mark.parametrize("index", [0, 1])
def test_gemma2(index: int) -> None:
    fields = {"layer_types": BOTH, "sliding_window": 5, "query_pre_attn_scalar": 144}
    theirs = Theirs("gemma2", "Gemma2", attn_logit_softcapping=0.7, **fields)
    config = attn(window=(5, None)[index], logit_cap=0.7, scale=144**-0.5)
    compare(config, theirs, index, (SLIDING, FULL)[index])


@pytest.mark.parametrize("clip", [None, 0.5])
def test_olmoe(clip: float | None) -> None:
    theirs = Theirs("olmoe", "Olmoe", clip_qkv=clip)
    compare(attn(qk_norm="all_heads", clip=clip), theirs, 0, FULL)


def test_minimax_m2() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    theirs = Theirs("minimax_m2", "MiniMaxM2", rope_parameters=rope, rotary_dim=4)
    compare(attn(qk_norm="all_heads", rotary_dim=4, rotary_theta=5e6), theirs, 0, FULL)


def test_dbrx() -> None:
    heads = {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 5e5}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    theirs = Theirs("dbrx", "Dbrx", rope_parameters=rope, attn_config=heads)
    layer = theirs.layer(0)

    def fused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"in_proj.weight": weights["Wqkv.weight"], "out_proj.weight": weights["out_proj.weight"]}

    ours = attn(clip=0.5, rotary_theta=5e5).build(WIDTH, 0, 1, 0.02)
    assert_same_layer(ours, layer, theirs.run(layer, FULL), fused, width=WIDTH, tokens=TOKENS)


@pytest.mark.parametrize("index", [0, 1])
def test_step3p7(index: int) -> None:
    rope = {"rope_type": "default"}
    ropes = {
        "sliding_attention": rope | {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
        "full_attention": rope | {"rope_theta": 5e6, "partial_rotary_factor": 0.5},
    }
    fields = {"layer_types": BOTH, "sliding_window": 6, "rope_parameters": ropes}
    theirs = Theirs("step3p7", "Step3p7", "Text", num_sliding_attention_heads=4, **fields)
    theirs.text = ""
    config = attn(
        window=(6, None)[index],
        qk_norm="head",
        has_zero_centered_norm=True,
        output_gate="head",
        rotary_dim=(8, 4)[index],
        rotary_theta=(1e4, 5e6)[index],
    )
    compare(config, theirs, index, (SLIDING, FULL)[index], BOTH[index])


GROWTH = 0.1 * math.log(40) + 1
SCALING = {"kind": "yarn", "factor": 40.0, "original_context": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
SCALING |= {"truncates": True, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
SCALING |= {"low_frequency": 1.0, "high_frequency": 4.0}


@pytest.mark.parametrize(
    ("fields", "amplitude", "softmax"),
    [
        ({}, GROWTH, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, GROWTH**2),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0, (0.0707 * math.log(40) + 1) ** 2),
        ({"attention_factor": 1.5}, 1.5, 1.0),
        ({"kind": "none", "mscale_all_dim": 1.0}, 1.0, 1.0),
    ],
)
def test_scaling_grows_as_published(fields, amplitude: float, softmax: float) -> None:
    scaling = RotaryScaling(**(SCALING | fields))
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)
    assert scaling.softmax_factor == pytest.approx(softmax, rel=1e-12)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize("on_last", [False, True])
def test_rotation_is_a_complex_product_and_turns_back(layout, on_last: bool) -> None:
    x, angle = torch.randn(2, 5, 3, 10, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    turned = rotate(x, angle.cos(), angle.sin(), layout, on_last=on_last)
    kept, part = (x[..., :4], x[..., 4:]) if on_last else (x[..., 6:], x[..., :6])
    pairs = part.unflatten(-1, (3, 2)) if layout == "interleaved" else part.unflatten(-1, (2, 3)).mT
    turns = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    product = torch.view_as_complex(pairs.contiguous()) * turns
    expected = torch.view_as_real(product)
    expected = expected.flatten(-2) if layout == "interleaved" else expected.mT.flatten(-2)
    expected = torch.cat([kept, expected] if on_last else [expected, kept], dim=-1)
    assert torch.allclose(turned, expected, atol=1e-12)
    back = rotate(turned, angle.cos(), -angle.sin(), layout, on_last=on_last)
    assert torch.allclose(back, x, atol=1e-12)


@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_a_row_of_documents_is_blocked_as_they_are_alone(kind: str) -> None:
    # Longer than a block of queries, with chunks that start at odd tokens of the row.
    mixer = attn(**{kind: 37}, rotary_dim=0).build(WIDTH, 0, 1, 0.3).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sizes = [61, 300, 1, 140]
    position = torch.cat([torch.arange(size) for size in sizes])[None]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None]
    x = torch.randn(1, sum(sizes), WIDTH, dtype=torch.float64)
    together = mixer(x, Sequence(position, document, position))
    apart = [mixer(part, Sequence.whole(part[..., 0].long())) for part in x.split(sizes, dim=1)]
    assert torch.allclose(together, torch.cat(apart, dim=1), atol=1e-12)
