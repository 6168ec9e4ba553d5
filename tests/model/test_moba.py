"""Equal to the paper's equations written out one query at a time in float64."""

import pytest
import torch
from torch import Tensor

from model.mixer import Sequence
from model.mixers.moba import MobaConfig
from tests.architectures import randomise
from tests.closeness import SAME, assert_close

FIELDS = {"num_heads": 4, "num_key_heads": 2, "head_dim": 8, "rotary_dim": 4, "rotary_theta": 100.0}


def turned(x: Tensor, position: int, dim: int, theta: float) -> Tensor:
    """One head's vector after rotary: pairs (m, m + dim / 2) turned by position theta^(-2 m / dim)."""
    pairs = torch.complex(x[: dim // 2], x[dim // 2 : dim])
    angles = position * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    # The table is of float32.
    pairs = pairs * torch.complex(angles.float().cos(), angles.float().sin())
    return torch.cat([pairs.real, pairs.imag, x[dim:]])


def by_the_equations(config: MobaConfig, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """One document: arXiv 2502.13189, equations 2 to 6, with the own block always chosen."""
    heads, groups, dim, block = config.num_heads, config.num_key_heads, config.head_dim, config.block
    tokens = x.shape[0]
    q, k, v = (x @ weights["in_proj.weight"].T).split([heads * dim, groups * dim, groups * dim], dim=-1)
    q, k, v = q.view(tokens, heads, dim), k.view(tokens, groups, dim), v.view(tokens, groups, dim)

    def rotated(y: Tensor) -> Tensor:
        rows = [[turned(h, t, config.rotary_dim, config.rotary_theta) for h in y[t]] for t in range(tokens)]
        return torch.stack([torch.stack(row) for row in rows])

    q, k = rotated(q), rotated(k)
    out = torch.zeros(tokens, heads, dim, dtype=x.dtype)
    for t in range(tokens):
        for h in range(heads):
            group, own = h // (heads // groups), t // block
            gate = torch.tensor(
                [
                    float(q[t, h].detach() @ k[i * block : (i + 1) * block, group].mean(0).detach())
                    for i in range(own)
                ]
            )
            chosen = [*gate.topk(min(own, config.num_blocks - 1)).indices.tolist(), own] if own else [own]
            keys = [s for i in chosen for s in range(i * block, (i + 1) * block) if s <= t]
            attention = (k[keys, group] @ q[t, h] * dim**-0.5).softmax(0)
            out[t, h] = attention @ v[keys, group]
    return out.flatten(1) @ weights["out_proj.weight"].T


@pytest.mark.parametrize(("block", "num_blocks"), [(4, 3), (5, 2), (3, 1), (1, 4), (7, 20), (64, 2)])
def test_equals_the_equations(block: int, num_blocks: int) -> None:
    config = MobaConfig.model_validate({"kind": "moba", **FIELDS, "block": block, "num_blocks": num_blocks})
    mixer = config.build(24, 0, 2, 0.02).double()
    randomise(mixer)
    x = torch.randn(1, 40, 24, dtype=torch.float64, requires_grad=True)
    weights = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    their_x = x.detach().clone().requires_grad_()
    out, expected = (
        mixer(x, Sequence.whole(x[..., 0].long())),
        by_the_equations(config, weights, their_x[0])[None],
    )
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), [x, *mixer.parameters()])
    theirs = torch.autograd.grad((expected * weight).sum(), [their_x, *weights.values()])
    assert_close([out, *ours], [expected, *theirs], 1e-10)


def test_all_blocks_are_full_attention() -> None:
    fields = {**FIELDS, "rotary_dim": 0, "block": 4}
    mixers = [
        MobaConfig.model_validate({"kind": "moba", **fields, "block": block, "num_blocks": 20})
        .build(24, 0, 2, 0.02)
        .double()
        for block in (4, 64)
    ]
    randomise(mixers[0])
    mixers[1].load_state_dict(mixers[0].state_dict())
    x = torch.randn(1, 50, 24, dtype=torch.float64)
    first, second = (mixer(x, Sequence.whole(x[..., 0].long())) for mixer in mixers)
    assert_close([first], [second], SAME)
