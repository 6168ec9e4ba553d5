"""The MTP module of published checkpoints by its equations, over the tensors as they are named on the hub.

DeepSeek-V3 (arXiv 2412.19437, equation 21) normalises hidden state and embedding each by its own weight and
projects both; the published projections have the columns of the embedding first.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from model.hf.files import CONFIG, SINGLE
from model.hf.pretrained import load_pretrained, save_pretrained
from tests.architectures import random_model, small_architecture


class Names(NamedTuple):
    """Where the parts of the module stand, and whether the weights of norms are stored around 0."""

    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str
    is_zero_centered: bool


DEEPSEEK = Names(
    *(f"model.layers.2.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")), False
)
QWEN = Names(
    *(f"mtp.{name}.weight" for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")), True
)
MLA = ("moe=sigmoid", "residual.has_zero_centered_norm=false", "layout=mla", "model.mtp.mixer=mla")
GDN = ("moe=softmax", "layout.pattern=gdn attn", "moe.num_experts=4")
FAMILIES = {
    "deepseek_v3": (DEEPSEEK, MLA),
    "glm4_moe_lite": (DEEPSEEK, MLA),
    "qwen3_next": (QWEN, GDN),
    "qwen3_5_moe_text": (QWEN, GDN),
}
# Norms and products of up to 64 numbers of float64 one behind the other, a few hundred roundings of 2.2e-16.
LIMIT = 1e-12
# What writes into the residual stream.
SILENT = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_module_has_the_published_equations(model_type: str, tmp_path: Path) -> None:
    names, keys = FAMILIES[model_type]
    more = ("residual=pre_norm", "layout.ffn.pattern=moe", "model.depth=2", "model.mtp.depth=1")
    config = small_architecture([*more, *keys, "moe.shared_hidden=16"])
    model, hub = random_model(config, torch.float32), tmp_path / "hub"
    for router in model.routers():
        router.reset_buffers()
    save_pretrained(model, hub, model_type=model_type)
    tensors = load_file(hub / SINGLE)
    for name, tensor in tensors.items():
        if name.endswith(SILENT):
            tensor.zero_()
    save_file(tensors, hub / SINGLE, metadata={"format": "pt"})
    tokens = torch.randint(64, (1, 12))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    found = load_pretrained(hub, torch.float64).loss(tokens, targets)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    eps = json.loads((hub / CONFIG).read_text())["rms_norm_eps"]

    def normed(x: Tensor, name: str) -> Tensor:
        weight = wide[name] + 1 if names.is_zero_centered else wide[name]
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    # Layers write nothing, so that the stream is the embedding.
    embedded = wide["model.embed_tokens.weight"][tokens[0]]
    hidden = normed(embedded, "model.norm.weight")
    both = [normed(embedded[1:-1], names.embedding_norm), normed(hidden[:-2], names.hidden_norm)]
    ahead = normed(torch.cat(both, dim=-1) @ wide[names.projection].T, names.norm)
    expected = cross_entropy(ahead @ wide["lm_head.weight"].T, tokens[0, 2:], reduction="sum")
    torch.testing.assert_close(found.mtp, expected[None], rtol=LIMIT, atol=0)
