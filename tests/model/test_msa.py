"""Equal to transformers' MiniMax-M3 text attention, and its indexer learns from what attention looked at."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from kernels.block_selection import select_by_max
from model.mixer import Mixed, Sequence
from model.mixers.msa import Msa, MsaConfig
from tests.architectures import randomise
from tests.closeness import assert_close, in_float64
from tests.layers import assert_same_layer

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 24
FIELDS = {
    "kind": "msa",
    "num_heads": 4,
    "num_key_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "rotary_theta": 100.0,
    "index_dim": 8,
    "index_loss": 0.5,
    "norm_eps": 1e-6,
    "has_zero_centered_norm": True,
}
SHAPES = [(4, 3, 1), (5, 4, 2), (3, 1, 1), (64, 3, 1), (2, 30, 1)]


def their_layer(config: MsaConfig) -> tuple[nn.Module, nn.Module]:
    from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl, modeling_minimax_m3_vl

    theirs = configuration_minimax_m3_vl.MiniMaxM3VLTextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rotary_theta,
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
        },
        index_n_heads=config.num_key_heads,
        index_head_dim=config.index_dim,
        index_block_size=config.block,
        index_topk_blocks=config.num_blocks,
        index_local_blocks=config.num_local_blocks,
        layer_types=["minimax_m3_sparse"],
        attn_implementation="eager",
    )
    theirs._attn_implementation = "eager"
    layer = modeling_minimax_m3_vl.MiniMaxM3VLAttention(theirs, 0)
    return layer, modeling_minimax_m3_vl.MiniMaxM3VLRotaryEmbedding(theirs)


def in_our_names(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {
        "in_proj.weight": torch.cat([theirs[f"{part}_proj.weight"] for part in "qkv"]),
        "out_proj.weight": theirs["o_proj.weight"],
    }
    return ours | {
        name: x for name, x in theirs.items() if name[:2] not in ("q_", "k_", "v_", "o_") or "norm" in name
    }


def build(block: int, num_blocks: int, local: int) -> tuple[MsaConfig, Msa]:
    sizes = {"block": block, "num_blocks": num_blocks, "num_local_blocks": local}
    config = MsaConfig.model_validate({**FIELDS, **sizes})
    mixer = config.build(WIDTH, 0, 2, 0.02)
    randomise(mixer)
    return config, mixer


@pytest.mark.parametrize(("block", "num_blocks", "local"), SHAPES)
def test_equals_theirs(block: int, num_blocks: int, local: int) -> None:
    config, mixer = build(block, num_blocks, local)
    with in_float64():
        layer, rotary = their_layer(config)
    position = torch.arange(50)[None].expand(2, -1)

    def run(x: Tensor) -> Tensor:
        return layer(x, rotary(x, position), None, position_ids=position)[0]

    assert_same_layer(mixer, layer, run, in_our_names, width=WIDTH, tokens=50)
    # The same blocks are chosen, by every query and key head.
    x = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    with in_float64():
        theirs = layer.indexer(x, rotary(x, position), None, position).transpose(1, 2)
        q, k = mixer.double().indexer(x, Sequence.whole(x[..., 0].long()))
    options = {"block": block, "count": num_blocks - 1, "local": local - 1, "position": position}
    ours, _ = select_by_max(q, k, **options)
    own = (position // block)[..., None, None].expand(*ours.shape[:3], 1)
    ours = torch.cat([own, ours], dim=-1).sort(-1).values
    theirs = torch.nn.functional.pad(theirs, (0, max(0, ours.shape[-1] - theirs.shape[-1])), value=-1)
    ours = torch.nn.functional.pad(ours, (max(0, theirs.shape[-1] - ours.shape[-1]), 0), value=-1)
    assert torch.equal(ours, theirs.sort(-1).values)


def direct_loss(config: MsaConfig, mixer: Msa, x: Tensor) -> Tensor:
    """One document, one query and one key head at a time."""
    sequence = Sequence.whole(x[..., 0].long())
    heads, groups, size = config.num_heads, config.num_key_heads, config.block
    q, k, _ = mixer.in_proj(x).split(mixer.parts, dim=-1)
    table = sequence.rotary_table(config.rotary_dim, config.rotary_theta)
    from kernels.rotary import rotate

    q = rotate(mixer.q_norm(q.unflatten(-1, (-1, config.head_dim))), *table)[0]
    k = rotate(mixer.k_norm(k.unflatten(-1, (-1, config.head_dim))), *table)[0]
    index_q, index_k = (part[0] for part in mixer.indexer(x.detach(), sequence))
    total = x.new_zeros(())
    for t in range(x.shape[1]):
        for g in range(groups):
            products = index_k[: t + 1, 0] @ index_q[t, g]
            blocks = [list(range(s, min(s + size, t + 1))) for s in range(0, t + 1, size)]
            scores = torch.stack([products[block].max() for block in blocks])
            order = scores.detach().clone()
            order[max(0, len(blocks) - config.num_local_blocks) :] = torch.inf
            chosen = order.topk(min(len(blocks), config.num_blocks)).indices.tolist()
            keys = [s for i in chosen for s in blocks[i]]
            share = torch.zeros(len(chosen), dtype=x.dtype)
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                p = (k[keys, g] @ q[t, h] * config.head_dim**-0.5).softmax(0).detach()
                share += torch.stack([part.sum() for part in p.split([len(blocks[i]) for i in chosen])])
            share = share / share.sum()
            log_softmax = (scores[chosen] * config.index_dim**-0.5).log_softmax(0)
            total = total + (share * (share.log() - log_softmax)).sum()
    return config.index_loss * total


@pytest.mark.parametrize(("block", "num_blocks", "local"), SHAPES)
def test_index_loss_equals_the_direct_form(block: int, num_blocks: int, local: int) -> None:
    config, mixer = build(block, num_blocks, local)
    mixer = mixer.double()
    x = torch.randn(1, 30, WIDTH, dtype=torch.float64, requires_grad=True)
    losses = mixer(x, Sequence.whole(x[..., 0].long())).losses
    expected = direct_loss(config, mixer, x)
    parameters = list(mixer.indexer.parameters())
    ours = torch.autograd.grad(losses["index"], [x, *mixer.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters)
    assert_close([losses["index"].detach()], [expected.detach()], 1e-10)
    by_name = dict(zip(["x", *(name for name, _ in mixer.named_parameters())], ours, strict=True))
    for name, grad in by_name.items():
        assert ("indexer" in name) == (grad is not None), name
    assert_close([grad for name, grad in by_name.items() if "indexer" in name], theirs, 1e-9)


def test_no_token_sees_a_later_one() -> None:
    _, mixer = build(4, 3, 1)
    x = torch.randn(1, 60, WIDTH)
    changed = x.clone()
    changed[:, 33] += 1.0
    before, after = (mixer(y, Sequence.whole(y[..., 0].long())) for y in (x, changed))
    assert isinstance(before, Mixed)
    assert torch.equal(before.out[:, :33], after.out[:, :33])
    assert not torch.equal(before.out[:, 33], after.out[:, 33])


def test_without_a_coefficient_there_is_no_loss() -> None:
    config, _ = build(4, 3, 1)
    mixer = config.model_copy(update={"index_loss": 0.0}).build(WIDTH, 0, 2, 0.02)
    randomise(mixer)
    assert mixer(torch.randn(1, 9, WIDTH), Sequence.whole(torch.zeros(1, 9, dtype=torch.long))).losses is None
