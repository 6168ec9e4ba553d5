"""GLM-5.3-Flash: what is no part of the language model is left out, and said to be."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.hf.files import SINGLE
from model.hf.pretrained import load_pretrained, save_pretrained
from tests.architectures import random_model, small_architecture

OVERRIDES = [
    *("model=glm_5_3_flash_small", "model.width=16", "model.vocab_size=16", "model.ffn_hidden=8"),
    *("model.depth=4", "moe.num_experts=4", "moe.hidden=4", "moe.shared_hidden=4", "moe.top_k=2"),
    *("mixer.dsa_pooled.index_dim=8", "mixer.dsa_pooled.top_k=4", "mixer.dsa_pooled.index_pool=2"),
    *(f"mixer.kda.{name}=4" for name in ("key_dim", "value_dim", "decay_rank", "gate_rank")),
]


def test_tower_and_prediction_are_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = random_model(small_architecture(OVERRIDES), torch.float32)
    save_pretrained(model, tmp_path / "hub", model_type="glm5_next")
    file = tmp_path / "hub" / SINGLE
    more = {"model.visual.blocks.0.norm1.weight", "model.language_model.layers.4.eh_proj.weight"}
    save_file(load_file(file) | {name: torch.ones(2) for name in more}, file)
    again = load_pretrained(tmp_path / "hub")
    assert "leaves out 2 tensors" in capsys.readouterr().out
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
