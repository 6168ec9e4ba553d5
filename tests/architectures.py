"""Small architectures for tests, from the same config groups that users compose."""

from collections.abc import Sequence

import torch
from torch import nn

from conf.compose import compose
from model.config import Architecture
from model.language_model import LanguageModel

SMALL = (
    "model.width=32",
    "model.depth=4",
    "model.vocab_size=64",
    "model.ffn_hidden=48",
    "mixer.attn.num_heads=4",
    "mixer.attn.num_key_heads=2",
    "mixer.attn.head_dim=8",
    "mixer.attn.rotary_dim=4",
    "mixer.swa.window=7",
    "mixer.gdn.num_key_heads=2",
    "mixer.gdn.num_value_heads=4",
    "mixer.gdn.key_dim=8",
    "mixer.gdn.value_dim=12",
    "moe.num_experts=8",
    "moe.top_k=2",
    "moe.hidden=16",
    "moe.shared_hidden=16",
)


def small_architecture(overrides: Sequence[str] = ()) -> Architecture:
    """The default model at a size for tests."""
    return compose([*SMALL, *overrides], Architecture)


def random_model(config: Architecture, dtype: torch.dtype) -> LanguageModel:
    """The model with every parameter and buffer random: constant first values hide errors."""
    model = LanguageModel(config, dtype).to(dtype)
    randomise(model)
    return model


@torch.no_grad()
def randomise(module: nn.Module, *, with_buffers: bool = True) -> None:
    """Every parameter and buffer near a random value of a size that keeps activations of order one."""
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
        parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * (0.5 / fan_in**0.5))
    for buffer in module.buffers() if with_buffers else ():
        buffer.copy_(torch.randn(buffer.shape, dtype=torch.float64) * 0.05)
