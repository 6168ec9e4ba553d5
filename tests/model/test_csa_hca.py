"""The three attention forms of DeepSeek-V4 equal transformers' eager attention, with random weights."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from kernels.indexer import index_select
from model.mixer import Mixer, Sequence
from model.mixers.csa import Csa, CsaConfig
from model.mixers.hca import HcaConfig
from tests.architectures import randomise
from tests.closeness import assert_close, in_float64
from tests.layers import assert_same_layer

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 24
SCALING = {
    "kind": "yarn",
    "factor": 4.0,
    "original_context": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncates": True,
    "attention_factor": 1.0,
    "mscale": None,
    "mscale_all_dim": None,
    "low_frequency": 1.0,
    "high_frequency": 4.0,
}
FIELDS = {
    "num_heads": 4,
    "head_dim": 16,
    "query_rank": 12,
    "output_groups": 2,
    "output_rank": 6,
    "rotary_dim": 8,
    "rotary_theta": 1600.0,
    "rotary_scaling": SCALING,
    "window": 7,
    "norm_eps": 1e-6,
}
INDEX = {"index_heads": 16, "index_dim": 10, "index_top_k": 4, "index_loss": 0.5}
FORMS = {
    "window": ("sliding_attention", {"kind": "hca", "compression": None}),
    "hca": ("heavily_compressed_attention", {"kind": "hca", "compression": 9}),
    "csa": ("compressed_sparse_attention", {"kind": "csa", "compression": 4, **INDEX}),
    "csa_all": ("compressed_sparse_attention", {"kind": "csa", "compression": 4, **INDEX, "index_top_k": 99}),
}


def build(form: str) -> tuple[HcaConfig | CsaConfig, Mixer]:
    fields = {**FIELDS, **FORMS[form][1]}
    if form == "window":
        fields |= {"rotary_theta": 100.0, "rotary_scaling": {**SCALING, "kind": "none"}}
    kind = CsaConfig if fields["kind"] == "csa" else HcaConfig
    config = kind.model_validate(fields)
    mixer = config.build(WIDTH, 0, 2, 0.02)
    randomise(mixer)
    return config, mixer


def their_layer(form: str) -> tuple[nn.Module, nn.Module]:
    from transformers.models.deepseek_v4 import configuration_deepseek_v4, modeling_deepseek_v4

    index = {name: INDEX[f"index_{name}"] for name in ("heads", "dim")}
    theirs = configuration_deepseek_v4.DeepseekV4Config(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=FIELDS["num_heads"],
        head_dim=FIELDS["head_dim"],
        q_lora_rank=FIELDS["query_rank"],
        o_groups=FIELDS["output_groups"],
        o_lora_rank=FIELDS["output_rank"],
        qk_rope_head_dim=FIELDS["rotary_dim"],
        sliding_window=FIELDS["window"],
        rms_norm_eps=FIELDS["norm_eps"],
        layer_types=[FORMS[form][0]],
        mlp_layer_types=["moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 9},
        index_n_heads=index["heads"],
        index_head_dim=index["dim"],
        index_topk=FORMS[form][1].get("index_top_k", 4),
        rope_theta=100.0,
        compress_rope_theta=FIELDS["rotary_theta"],
        max_position_embeddings=256,
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
            "compress": {
                "rope_type": "yarn",
                "rope_theta": FIELDS["rotary_theta"],
                "partial_rotary_factor": 0.5,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.0,
            },
        },
    )
    theirs._attn_implementation = "eager"
    layer = modeling_deepseek_v4.DeepseekV4Attention(theirs, 0)
    return layer, modeling_deepseek_v4.DeepseekV4RotaryEmbedding(theirs)


def in_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, or gradients, under our names; the indexer's where there is one."""
    ours = {
        "in_proj.weight": torch.cat([theirs["q_a_proj.weight"], theirs["kv_proj.weight"]]),
        "q_norm.weight": theirs["q_a_norm.weight"],
        "q_proj.weight": theirs["q_b_proj.weight"],
        "kv_norm.weight": theirs["kv_norm.weight"],
        "sinks": theirs["sinks"],
        "group_proj.weight": theirs["o_a_proj.weight"],
        "out_proj.weight": theirs["o_b_proj.weight"],
    }
    theirs_names = {"compressor": "compressor", "compressor.indexer": "indexer.compressor"}
    for their_name, name in theirs_names.items():
        if f"{their_name}.kv_proj.weight" in theirs:
            parts = [theirs[f"{their_name}.{part}_proj.weight"] for part in ("kv", "gate")]
            ours[f"{name}.in_proj.weight"] = torch.cat(parts)
            ours[f"{name}.bias"] = theirs[f"{their_name}.position_bias"]
            ours[f"{name}.norm.weight"] = theirs[f"{their_name}.kv_norm.weight"]
    if "compressor.indexer.q_b_proj.weight" in theirs:
        ours["indexer.q_proj.weight"] = theirs["compressor.indexer.q_b_proj.weight"]
        ours["indexer.head_proj.weight"] = theirs["compressor.indexer.scorer.weights_proj.weight"]
    return ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_equals_theirs(form: str, tokens: int) -> None:
    _, mixer = build(form)
    with in_float64():
        layer, rotary = their_layer(form)
    for module in layer.modules():  # theirs keep the rotary frequencies of their own copies
        assert not any(
            name.endswith("inv_freq") and buffer.isnan().any() for name, buffer in module.named_buffers()
        )

    def run(x: Tensor) -> Tensor:
        position = torch.arange(tokens)[None].expand(2, -1)
        tables = {kind: rotary(x, position, layer_type=kind) for kind in ("main", "compress")}
        back = torch.arange(tokens)[:, None] - torch.arange(tokens)
        mask = torch.zeros(tokens, tokens).masked_fill((back < 0) | (back >= FIELDS["window"]), float("-inf"))
        # With one token theirs leaves the mask of the entries out, and there are none.
        return layer(x, tables, position, mask.expand(2, 1, -1, -1))[0]

    def weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # What gets no gradient of theirs gets none of ours.
        return in_our_names({name: x.nan_to_num() for name, x in theirs.items()})

    assert_same_layer(mixer, layer, run, weights, width=WIDTH, tokens=tokens)


def test_the_same_entries_are_chosen() -> None:
    with in_float64():
        check_entries()


def check_entries() -> None:
    config, mixer = build("csa")
    assert isinstance(mixer, Csa)
    layer, _ = their_layer("csa")
    randomise(layer, with_buffers=False)
    mixer.load_state_dict(in_our_names(layer.state_dict()))
    x, position = torch.randn(2, 50, WIDTH), torch.arange(50)[None].expand(2, -1)
    sequence = Sequence.whole(x[..., 0].long())
    latent = mixer._read(x, mixer._table(sequence))[0]
    made = sequence.compression(config.compression, config.compression)
    index = mixer.indexer(x, latent, sequence, made)
    ours = index_select(*index, top_k=config.index_top_k, last=made.whole.last)
    theirs = layer.compressor.indexer(x, latent, position, None, 0)
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


def test_index_loss_equals_the_direct_form() -> None:
    """KL from the attention on the chosen entries, summed over heads, one query at a time."""
    config, mixer = build("csa")
    mixer = mixer.double()
    x = torch.randn(1, 40, WIDTH, dtype=torch.float64, requires_grad=True)
    sequence = Sequence.whole(x[..., 0].long())
    loss = mixer(x, sequence).losses["index"]
    latent, q, kv = (part.detach() for part in mixer._read(x, mixer._table(sequence)))
    made = sequence.compression(config.compression, config.compression)
    entries = mixer.compressor(x, made).detach()[0]
    index_q, index_k, weight = mixer.indexer(x.detach(), latent, sequence, made)
    expected = x.new_zeros(())
    for t in range(40):
        complete = (t + 1) // config.compression
        if complete == 0:
            continue
        scores = ((index_q[0, t] @ index_k[0, :complete].T).relu() * weight[0, t][:, None]).sum(0)
        chosen = scores.topk(min(complete, config.index_top_k)).indices
        near = kv[0, max(0, t - config.window + 1) : t + 1]
        keys = torch.cat([near, entries[chosen]])
        logits = torch.cat([q[0, t] @ keys.T * config.head_dim**-0.5, mixer.sinks.detach()[:, None]], dim=-1)
        share = logits.softmax(-1)[:, len(near) : -1].sum(0)
        share = share / share.sum()
        expected = expected + (share * (share.log() - scores[chosen].log_softmax(0))).sum()
    expected = config.index_loss * expected
    names = [name for name, _ in mixer.named_parameters()]
    ours = torch.autograd.grad(loss, [x, *mixer.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(expected, list(mixer.indexer.parameters()))
    assert_close([loss.detach()], [expected.detach()], 1e-10)
    by_name = dict(zip(["x", *names], ours, strict=True))
    for name, grad in by_name.items():
        assert ("indexer" in name) == (grad is not None), name
    assert_close([grad for name, grad in by_name.items() if "indexer" in name], theirs, 1e-9)


def test_no_token_sees_a_later_one() -> None:
    _, mixer = build("csa")
    x = torch.randn(1, 60, WIDTH)
    changed = x.clone()
    changed[:, 33] += 1.0
    before, after = (mixer(y, Sequence.whole(y[..., 0].long())).out for y in (x, changed))
    assert torch.equal(before[:, :33], after[:, :33])
    assert not torch.equal(before[:, 33], after[:, 33])
