"""Small architectures for tests, from the same config groups that users compose."""

import functools
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
    "mixer.chunked.chunk=6",
    "mixer.nope.temperature_interval=5",
    "mixer.mla.num_heads=3",
    "mixer.mla.query_latent_dim=12",
    "mixer.mla.latent_dim=10",
    "mixer.mla.key_dim=6",
    "mixer.mla.shared_key_dim=4",
    "mixer.mla.value_dim=5",
    "mixer.dsa.top_k=4",
    "mixer.dsa.index_heads=2",
    "mixer.dsa.index_dim=6",
    "mixer.dsa_pooled.top_k=4",
    "mixer.dsa_pooled.index_pool=2",
    "mixer.zigzag.block=3",
    "mixer.gdn.num_key_heads=2",
    "mixer.gdn.num_value_heads=4",
    "mixer.gdn.key_dim=8",
    "mixer.gdn.value_dim=12",
    "mixer.kda.num_heads=2",
    "mixer.kda.key_dim=8",
    "mixer.kda.value_dim=12",
    "mixer.kda.decay_rank=6",
    "mixer.kda.gate_rank=5",
    "mixer.lightning.num_heads=2",
    "mixer.lightning.key_dim=8",
    "mixer.lightning.value_dim=12",
    "mixer.lightning.decay_rank=6",
    "mixer.mamba.num_channels=24",
    "mixer.mamba.state_dim=5",
    "mixer.mamba.dt_rank=6",
    "mixer.mamba2.num_heads=4",
    "mixer.mamba2.key_dim=8",
    "mixer.mamba2.value_dim=12",
    "mixer.moba.num_heads=4",
    "mixer.moba.num_key_heads=2",
    "mixer.moba.head_dim=8",
    "mixer.moba.rotary_dim=4",
    "mixer.moba.block=3",
    "mixer.moba.num_blocks=3",
    "mixer.msa.num_heads=4",
    "mixer.msa.num_key_heads=2",
    "mixer.msa.head_dim=8",
    "mixer.msa.rotary_dim=4",
    "mixer.msa.index_dim=8",
    "mixer.msa.block=3",
    "mixer.msa.num_blocks=3",
    "mixer.msa.num_local_blocks=1",
    "mixer.nsa.num_heads=4",
    "mixer.nsa.num_key_heads=2",
    "mixer.nsa.key_dim=8",
    "mixer.nsa.value_dim=6",
    "mixer.nsa.rotary_dim=4",
    "mixer.nsa.compressor_hidden=10",
    "mixer.nsa.entry_length=4",
    "mixer.nsa.entry_stride=2",
    "mixer.nsa.block=4",
    "mixer.nsa.num_blocks=4",
    "mixer.nsa.window=5",
    "mixer.ssa.num_heads=4",
    "mixer.ssa.num_key_heads=2",
    "mixer.ssa.head_dim=8",
    "mixer.ssa.rotary_dim=4",
    "mixer.ssa.block=3",
    "mixer.ssa.num_blocks=3",
    "mixer.hca.num_heads=4",
    "mixer.hca.head_dim=8",
    "mixer.hca.query_rank=12",
    "mixer.hca.output_rank=6",
    "mixer.hca.rotary_dim=4",
    "mixer.hca.window=5",
    "mixer.hca.compression=4",
    "mixer.csa.compression=2",
    "mixer.csa.index_dim=6",
    "mixer.csa.index_heads=3",
    "mixer.csa.index_top_k=3",
    "moe.num_experts=8",
    "moe.top_k=2",
    "moe.hidden=16",
    "moe.shared_hidden=16",
)


def small_architecture(overrides: Sequence[str] = ()) -> Architecture:
    """The default model at a size for tests. Frozen, so that tests can have the same one."""
    return _composed(tuple(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Architecture:
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
