"""What `loss` gives side by side: cross-entropy, what large logits cost, and what each layer reports."""

import pytest
import torch

from model.block import Block, Carry
from model.mixer import Sequence
from tests.architectures import random_model, small_architecture

# Each side adds some hundred numbers of float64, a thousand at most, in an order of its own: a thousand times
# the 2.2e-16 of one rounding, and four times that for what the terms themselves are off.
LIMIT = 1e-12


@pytest.mark.parametrize("cap", ["null", "1.5"])
def test_large_logits_are_counted_beside_the_cross_entropy(cap: str) -> None:
    config = small_architecture(["layout.pattern=attn", "model.z_loss=0.2", f"model.logit_cap={cap}"])
    model = random_model(config, torch.float64)
    tokens = torch.randint(config.model.vocab_size, (2, 9))
    targets = tokens.roll(-1, 1)
    targets[0, 3] = targets[:, -1] = -100
    losses, logits = model.loss(tokens, targets), model(tokens)
    counted = targets >= 0
    shares = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(losses.cross_entropy, -shares[counted].sum(), rtol=LIMIT, atol=0)
    assert torch.allclose(
        losses.logit_z[0], 0.2 * logits.logsumexp(-1)[counted].square().sum(), rtol=LIMIT, atol=0
    )


def test_what_layers_report_is_summed_over_all_of_them() -> None:
    config = small_architecture(["layout.pattern=dsa", "layout.ffn.pattern=moe", "moe.balance_loss=0.3"])
    model = random_model(config, torch.float64)
    tokens = torch.randint(config.model.vocab_size, (1, 11))
    losses = model.loss(tokens, tokens)
    stream, index, balance = model.embed.weight[tokens], [], []
    for block in model.blocks:
        stream, _, aux = block(stream, Sequence.whole(tokens), Carry())
        index.append(aux.losses["index"])
        balance.append(aux.routing.balance_loss)
    assert len(index) == 4
    assert torch.allclose(losses.auxiliary["index"], sum(index), rtol=LIMIT, atol=0)
    assert torch.allclose(losses.auxiliary["balance"], sum(balance), rtol=LIMIT, atol=0)


def test_each_router_moves_by_its_own_load() -> None:
    config = small_architecture(["layout.pattern=attn", "layout.ffn.pattern=moe", "moe.bias_rate=0.5"])
    model = random_model(config, torch.float64)
    routers = [block.moe.router for block in model.blocks if isinstance(block, Block)]
    before = [router.bias.clone() for router in routers]
    # In layer n expert n is the one with too many tokens.
    load = torch.eye(len(routers), config.moe.num_experts, dtype=torch.float64) * 8
    model.update_expert_biases(load)
    for layer, (router, old) in enumerate(zip(routers, before, strict=True)):
        moved = router.bias - old
        assert moved.argmin() == layer
        # One falls and seven rise by the rate, less their mean: (7 - 1) / 8 of it.
        expected = torch.full((8,), 0.5 * (1 - 6 / 8), dtype=torch.float64)
        expected[layer] = -0.5 * (1 + 6 / 8)
        assert torch.allclose(moved, expected, rtol=LIMIT, atol=0)
