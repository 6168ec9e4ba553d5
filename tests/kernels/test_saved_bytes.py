"""Bytes that mixers and layers keep for backward with all kernels in Triton, beside what configs count."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.compose import group_options
from kernels.choose import FAMILIES, use_backends
from model.block import Block, Carry
from model.count import half_bytes
from model.mixer import Mixed, Sequence
from tests.live_bytes import LiveBytes
from train.config.load import load_config

pytestmark = pytest.mark.interpreted
# Whole windows, chunks and pools of every entry; more keys than a query may choose.
LENGTHS = (512, 1024)
ENTRIES = group_options("mixer")
SYSTEMS = [name for name in group_options("model") if name.endswith("_small")]
VARIANTS = (
    ("attn", "qk_norm=none", "output_gate=none"),
    ("attn", "qk_norm=none", "clip=8.0", "output_gate=head"),
    ("attn", "qk_norm=none", "output_gate=none", "value_scale=0.5"),
    ("attn", "qk_norm=none", "rotary_dim=0", "clip=8.0", "value_scale=0.5"),
    ("attn", "qk_norm=all_heads", "clip=8.0", "value_scale=0.5"),
    ("attn", "qk_norm=weightless", "temperature=0.1"),
    ("attn", "qk_norm=head", "rotary_dim=0", "temperature=0.1"),
    ("csa", "index_loss=0"),
    ("dsa", "index_stage=dense"),
    ("dsa_pooled", "index_stage=dense"),
    ("dsa_shared", "index_stage=dense"),
    ("gdn", "has_decay=false"),
    ("gdn", "has_output_gate=false"),
    ("kda", "decay=bounded_sigmoid"),
    ("lightning", "decay=channel"),
    ("lightning", "decay=learned", "output_gate=none", "norm=per_head"),
    ("lightning", "decay=retnet", "rotary_dim=16", "has_scale=true"),
    ("lightning", "has_silu=false", "has_scale=true"),
    ("mamba", "has_inner_norm=false"),
    ("mla", "has_latent_scale=true"),
    ("mla", "query_latent_dim=null"),
    ("moba", "rotary_dim=0"),
    ("nsa", "compressor=mean"),
    ("nsa", "has_shared_keys=true"),
)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are asked for and not run: tensors have shapes and no memory."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "__call__", lambda *arguments, **options: None)
    with use_backends(dict.fromkeys(FAMILIES, "triton")):
        yield


def narrow(module: nn.Module) -> nn.Module:
    """The module in bfloat16, but for what is to be in full precision."""
    for part in module.modules():
        if not getattr(part, "needs_full_precision", False):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)
    return module


def kept_per_token(module: nn.Module, shape: tuple[int, ...], *others: Any) -> float:
    """Bytes that the module leaves behind for each token more, less what it returns and the rotary tables."""
    short, long = (_kept(module, length, shape, *others) for length in LENGTHS)
    return (long - short) / (LENGTHS[1] - LENGTHS[0])


def _kept(module: nn.Module, length: int, shape: tuple[int, ...], *others: Any) -> int:
    row = torch.arange(length, device="meta")[None]
    sequence = Sequence(row, None, row, uniform=0.5)
    selection = torch.empty(1, length, 64, dtype=torch.long, device="meta")
    x = torch.empty(1, length, *shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    others = tuple(Carry(selection) if other is Carry else selection for other in others)
    # The layers of a model share the tables.
    module(x, sequence, *others)
    before = [row, selection, *(x for table in sequence._tables.values() for x in table)]
    with LiveBytes([x, *before, *module.parameters(), *module.buffers()], device="meta") as live:
        # Made here, so that it counts where it is kept.
        stream = x * 1
        out = module(stream, sequence, *others)
        del stream
    returned = {id(storage): storage for storage in _returned(out, selection)}
    return live.now - sum(storage.nbytes() for storage in returned.values())


def _returned(out: Any, selection: Tensor) -> Iterator[Any]:
    """Storages of the stream and the shortcut; a selection is kept for backward as well."""
    if isinstance(out, Tensor):
        yield out.untyped_storage()
    elif isinstance(out, Mixed):
        yield out.out.untyped_storage()
    else:
        yield out[0].untyped_storage()
        if out[1].shortcut is not None:
            yield out[1].shortcut.untyped_storage()


@pytest.mark.parametrize("choice", [*((entry,) for entry in ENTRIES), *VARIANTS], ids=" ".join)
def test_a_config_counts_what_its_mixer_keeps(choice: tuple[str, ...]) -> None:
    entry, *values = choice
    architecture = load_config([f"mixer.{entry}.{value}" for value in values], 1).architecture
    config, width = architecture.mixer[entry], architecture.model.width
    with torch.device("meta"):
        mixer = config.build(width, 1, 4, 0.02).to(torch.bfloat16)
    found = kept_per_token(mixer, (width,), *([Tensor] if mixer.shares_selection else []))
    # The input is part of what the half around it keeps.
    found -= width * 2
    assert config.activation_bytes(width) == pytest.approx(found, rel=0.002)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_model_counts_what_its_layers_keep(system: str) -> None:
    architecture = load_config([f"model={system}"], 1).architecture
    streams, width = architecture.residual.streams, architecture.model.width
    for layer in sorted(set(architecture.layers)):
        with torch.device("meta"):
            block = narrow(Block(architecture, 1, layer))
        found = kept_per_token(block, (width,) if streams == 1 else (streams, width), Carry)
        halves = half_bytes(architecture, layer)
        assert halves.mixer + halves.ffn == pytest.approx(found, rel=0.002), layer
