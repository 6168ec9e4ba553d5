"""MTP modules by their equations: DeepSeek-V3, arXiv 2412.19437 equations 21 to 23."""

import pytest
import torch
from torch import Tensor

from model.block import Carry
from model.mixer import Sequence
from model.mtp import MTPModule
from tests.architectures import random_model, small_architecture

TOKENS = 12
# Six layers one behind the other, each with sums of up to 64 numbers of float64: 400 roundings of 2.2e-16 in
# a row are 1e-13, and norms pass on a relative error as it is.
LIMIT = 1e-12


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("puts_hidden_first", [False, True])
def test_each_module_predicts_one_token_further(puts_hidden_first: bool) -> None:
    kinds = ("layout.pattern=attn", "layout.ffn.pattern=dense", "model.mtp.mixer=attn", "model.mtp.ffn=dense")
    first = f"model.mtp.puts_hidden_first={str(puts_hidden_first).lower()}"
    plain = "residual.has_zero_centered_norm=false"
    config = small_architecture([*kinds, "model.mtp.depth=2", plain, first])
    model, eps = random_model(config, torch.float64), config.residual.norm_eps
    tokens = torch.randint(config.model.vocab_size, (2, TOKENS))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    found = model.loss(tokens, targets).mtp

    table, head = model.embed.weight, model.head.weight
    stream = table[tokens]
    for block in model.blocks:
        stream, *_ = block(stream, Sequence.whole(tokens), Carry())
    hidden, losses = rms(stream, model.norm.weight, eps), []
    for depth, module in enumerate(model.mtp, 1):
        assert isinstance(module, MTPModule)
        # Those tokens alone that have one so much later: what stands behind them changes nothing before.
        count = TOKENS - depth
        ahead = rms(table[tokens[:, depth:]], module.embed_norm.weight, eps)
        before = rms(hidden[:, :count], module.hidden_norm.weight, eps)
        parts = (before, ahead) if puts_hidden_first else (ahead, before)
        joined = torch.cat(parts, -1) @ module.in_proj.weight.T
        stream, *_ = module.block(joined, Sequence.whole(tokens[:, :count]), Carry())
        hidden = rms(stream, module.norm.weight, eps)
        shares = (hidden @ head.T).log_softmax(-1)[:, :-1]
        losses.append(-shares.gather(2, tokens[:, depth + 1 :, None]).sum())
    assert torch.allclose(found, torch.stack(losses), rtol=LIMIT, atol=0)
