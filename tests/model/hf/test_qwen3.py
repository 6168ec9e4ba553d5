"""Qwen3-Next and Qwen3.5: the MTP module, and all names under which tensors are found."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.errors import CheckpointError
from model.hf.files import SINGLE
from model.hf.pretrained import load_pretrained, save_pretrained
from model.language_model import LanguageModel
from tests.architectures import random_model, small_architecture

TYPES = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe")
WITH_MTP = [
    *("moe=softmax", "residual=pre_norm", "layout.pattern=gdn attn", "layout.ffn.pattern=moe"),
    *("model.depth=2", "model.mtp.depth=1", "moe.num_experts=4"),
]


def written(directory: Path, model_type: str, overrides: list[str]) -> LanguageModel:
    torch.manual_seed(0)
    model = random_model(small_architecture(overrides), torch.float32)
    for router in model.routers():
        router.reset_buffers()
    save_pretrained(model, directory, model_type=model_type)
    return model


def change(directory: Path, change_one: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    """Replaces every tensor of a directory by what `change_one` makes of it."""
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / SINGLE).items():
        found |= {key: value.contiguous() for key, value in change_one(name, tensor).items()}
    save_file(found, directory / SINGLE)


def assert_same(first: LanguageModel, second: LanguageModel) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("model_type", TYPES)
def test_prediction_is_written_and_read_back(model_type: str, tmp_path: Path) -> None:
    model = written(tmp_path / "hub", model_type, WITH_MTP)
    names = load_file(tmp_path / "hub" / SINGLE).keys()
    around = {"fc.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight"}
    assert {f"mtp.{name}" for name in around} <= names
    assert "mtp.layers.0.mlp.experts.3.gate_proj.weight" in names
    again = load_pretrained(tmp_path / "hub")
    assert again.config.model.mtp.depth == 1
    assert_same(model, again)


@pytest.mark.parametrize("model_type", TYPES)
def test_prediction_may_be_missing(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(tmp_path / "hub", model_type, WITH_MTP)
    change(tmp_path / "hub", lambda name, tensor: {} if name.startswith("mtp.") else {name: tensor})
    again = load_pretrained(tmp_path / "hub")
    assert "has no tensors for model.mtp.depth=1" in capsys.readouterr().out
    assert again.config.model.mtp.depth == 0
    assert not again.mtp
    tokens = torch.randint(64, (2, 9))
    assert torch.equal(model(tokens), again(tokens))


def other_form(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Fused experts one by one."""
    start, _, kind = name.rpartition(".")
    if kind == "gate_up_proj":
        halves = {"gate_proj": tensor.chunk(2, 1)[0], "up_proj": tensor.chunk(2, 1)[1]}
        return {f"{start}.{e}.{k}.weight": x[e] for k, x in halves.items() for e in range(len(x))}
    if kind == "down_proj":
        return {f"{start}.{e}.down_proj.weight": tensor[e] for e in range(len(tensor))}
    return {name: tensor}


@pytest.mark.parametrize("model_type", TYPES[1:])
@pytest.mark.parametrize("layers", ["0", "01"])
def test_experts_are_read_fused_and_apart(model_type: str, layers: str, tmp_path: Path) -> None:
    model = written(tmp_path / "hub", model_type, WITH_MTP)
    chosen = tuple(f"layers.{layer}.mlp.experts." for layer in layers)
    change(
        tmp_path / "hub",
        lambda name, x: other_form(name, x) if any(part in name for part in chosen) else {name: x},
    )
    assert_same(model, load_pretrained(tmp_path / "hub"))


def test_text_model_is_read_under_the_names_of_the_whole(tmp_path: Path) -> None:
    model = written(tmp_path / "hub", "qwen3_5_moe_text", WITH_MTP)
    change(
        tmp_path / "hub",
        lambda name, x: {f"model.language_model.{name[6:]}" if name.startswith("model.") else name: x},
    )
    assert_same(model, load_pretrained(tmp_path / "hub"))


def test_vision_is_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = written(tmp_path / "hub", "qwen3_5_moe", WITH_MTP)
    tower = {"model.visual.patch_embed.proj.weight": torch.ones(2)}
    change(tmp_path / "hub", lambda name, x: {name: x} | (tower if name == "lm_head.weight" else {}))
    assert_same(model, load_pretrained(tmp_path / "hub"))
    assert "leaves out 1 tensors" in capsys.readouterr().out


def test_lost_expert_is_missed(tmp_path: Path) -> None:
    written(tmp_path / "hub", "qwen3_5_moe_text", WITH_MTP)
    change(tmp_path / "hub", lambda name, x: {} if "mtp.layers.0.mlp.experts.2." in name else {name: x})
    with pytest.raises(CheckpointError, match="missing tensors"):
        load_pretrained(tmp_path / "hub")
