"""Equal to a direct form in float64: every pair of tokens, by the blocks that they are in."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.mixer import Sequence
from model.mixers.zigzag import Zigzag, ZigzagConfig
from tests.architectures import randomise
from tests.closeness import assert_close, outputs_and_grads
from tests.layers import entry

WIDTH = 32


def zigzag(**fields: Any) -> ZigzagConfig:
    sizes = {"num_heads": 3, "query_latent_dim": 12, "latent_dim": 10, "key_dim": 6, "shared_key_dim": 4}
    sizes |= {"value_dim": 5, "rotary_dim": 4, "has_zero_centered_norm": False}
    return entry("zigzag", **(sizes | fields))


def rows_of(sizes: list[int]) -> tuple[Tensor, Tensor]:
    position = torch.cat([torch.arange(size) for size in sizes])[None]
    return position, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]


def visible_pairs(config: ZigzagConfig, position: Tensor, document: Tensor) -> Tensor:
    token_keys = list(zip(document[0].tolist(), position[0].tolist(), strict=True))

    def sees(t: int, s: int) -> bool:
        query, key = token_keys[t][1] // config.block, token_keys[s][1] // config.block
        is_near = key < config.first_blocks or query - key < config.recent_blocks
        return s <= t and is_near and token_keys[t][0] == token_keys[s][0]

    return torch.tensor([[sees(t, s) for s in range(len(token_keys))] for t in range(len(token_keys))])


def direct(
    config: ZigzagConfig, weights: dict[str, Tensor], x: Tensor, position: Tensor, visible: Tensor
) -> Tensor:
    """Multi-head latent attention as DeepSeek-V2 writes it, one head after the other, under a mask."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.latent_eps).sqrt() * weight

    def turn(x: Tensor) -> Tensor:
        frequencies = config.rotary_theta ** -(torch.arange(0, 4, 2).double() / 4)
        # Angles are float32 in both: long positions in float64 would be another function.
        angle = (position[..., None] * frequencies).float()
        pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous())
        turns = torch.complex(angle.cos().double(), angle.sin().double())
        return torch.view_as_real(pairs * turns).flatten(-2)

    down = x @ weights["down_proj.weight"].T
    query, latent, shared = down[..., :12], down[..., 12:22], turn(down[..., 22:])
    query, latent = norm(query, weights["q_norm.weight"]), norm(latent, weights["kv_norm.weight"])
    heads, outputs = config.num_heads, []
    for h in range(heads):
        q = query @ weights["q_proj.weight"].view(heads, 10, 12)[h].T
        q = torch.cat([q[..., :6], turn(q[..., 6:])], dim=-1)
        k = torch.cat([latent @ weights["kv_proj.weight"][6 * h : 6 * h + 6].T, shared], dim=-1)
        v = latent @ weights["kv_proj.weight"][6 * heads + 5 * h : 6 * heads + 5 * h + 5].T
        scores = (q @ k.mT * 10**-0.5).masked_fill(~visible, float("-inf"))
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=-1) @ weights["out_proj.weight"].T


@pytest.mark.parametrize("sizes", [[1], [290], [5, 24, 1, 200, 70]], ids=str)
@pytest.mark.parametrize(("block", "first", "recent"), [(3, 1, 2), (16, 1, 1), (7, 2, 3), (8, 0, 2)])
def test_equals_the_direct_form(sizes: list[int], block: int, first: int, recent: int) -> None:
    config = zigzag(block=block, first_blocks=first, recent_blocks=recent)
    mixer = config.build(WIDTH, 0, 2, 0.02).double()
    assert isinstance(mixer, Zigzag)
    randomise(mixer)
    position, document = rows_of(sizes)
    visible = visible_pairs(config, position, document)
    parameters = [p.detach() for p in mixer.parameters()]
    names = [name for name, _ in mixer.named_parameters()]
    x = torch.randn(1, sum(sizes), WIDTH, dtype=torch.float64)

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        sequence = Sequence(position, document if len(sizes) > 1 else None, position)
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (x, sequence))

    def theirs(x: Tensor, *weights: Tensor) -> Tensor:
        return direct(config, dict(zip(names, weights, strict=True)), x, position, visible)

    found = outputs_and_grads(ours, [x, *parameters])
    assert_close(found, outputs_and_grads(theirs, [x, *parameters]), 1e-11)


@pytest.mark.parametrize("context", [1, 5, 12, 13, 40, 100])
@pytest.mark.parametrize(("block", "first", "recent"), [(3, 1, 2), (16, 1, 1), (4, 0, 2), (7, 2, 3)])
def test_flops_count_the_pairs(context: int, block: int, first: int, recent: int) -> None:
    config = zigzag(block=block, first_blocks=first, recent_blocks=recent)
    position, document = rows_of([context])
    pairs = int(visible_pairs(config, position, document).sum())
    per_pair = 2 * config.num_heads * (config.head_dim + config.value_dim)
    assert config.flops(WIDTH, context).core == pytest.approx(per_pair * pairs / context)
