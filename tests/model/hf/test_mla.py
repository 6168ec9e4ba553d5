"""MTP modules in the form of DeepSeek-V3: further layers behind the last."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.hf.convert import convert
from model.hf.family import families
from model.hf.files import HubDirectory
from model.hf.pretrained import load_pretrained, read_config, save_pretrained
from model.language_model import LanguageModel
from tests.architectures import random_model, small_architecture
from tests.model.hf.draws.deepseek_v4 import SMALL as DEEPSEEK_V4
from tests.model.hf.draws.longcat import MODEL as LONGCAT

PLAIN = ["moe=sigmoid", "residual=pre_norm", "residual.has_zero_centered_norm=false", "model.depth=2"]
MIXERS = {
    "deepseek_v3": ["layout=mla"],
    "kimi_k2": ["layout=mla"],
    "glm4_moe": ["layout=attn", "mixer.attn.output_gate=none"],
    "glm4_moe_lite": ["layout=mla"],
    "deepseek_v32": ["layout=dsa"],
    "glm_moe_dsa": ["layout=dsa", "mixer.dsa.index_rotary_layout=interleaved"],
}


def model_of(model_type: str) -> LanguageModel:
    mtp = ["model.mtp.depth=2", f"model.mtp.mixer={MIXERS[model_type][0].removeprefix('layout=')}"]
    sizes = ["moe.shared_hidden=16", "model.mtp.coefficient=0.1"]
    config = small_architecture([*PLAIN, *MIXERS[model_type], *mtp, *sizes])
    return random_model(config, torch.float32)


@pytest.mark.parametrize("model_type", sorted(MIXERS))
def test_modules_that_predict_ahead_are_kept(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type)
    save_pretrained(model, tmp_path / "x", model_type=model_type)
    again = load_pretrained(tmp_path / "x")
    assert again.config.model.mtp.depth == 2
    for (key, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("model_type", sorted(MIXERS))
def test_they_repeat_embedding_and_head(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type)
    save_pretrained(model, tmp_path / "own", model_type="weft")
    convert(tmp_path / "own", tmp_path / "converted", model_type=model_type)
    save_pretrained(model, tmp_path / "x", model_type=model_type)
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert tensors.keys() == converted.keys()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in tensors.items())
    for layer in (2, 3):
        prefix = f"model.layers.{layer}."
        assert torch.equal(tensors[f"{prefix}embed_tokens.weight"], model.embed.weight)
        assert model.head is not None
        assert torch.equal(tensors[f"{prefix}shared_head.head.weight"], model.head.weight)
        assert tensors[f"{prefix}eh_proj.weight"].shape == (32, 64)


def test_a_directory_without_them_loads_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of("deepseek_v3")
    save_pretrained(model, tmp_path / "x", model_type="deepseek_v3")
    path = tmp_path / "x" / "model.safetensors"
    tensors = load_file(path)
    kept = {
        name: x for name, x in tensors.items() if not name.startswith(("model.layers.2.", "model.layers.3."))
    }
    save_file(kept, path, metadata={"format": "pt"})
    again = load_pretrained(tmp_path / "x")
    assert again.config.model.mtp.depth == 0
    assert "has no tensors for model.mtp.depth=2" in capsys.readouterr().out
    tokens = torch.randint(64, (1, 9))
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["dsa", "dsa", "dsa", "dsa"]),
        ({"index_topk_pattern": "FSSF"}, ["dsa", "dsa_shared", "dsa_shared", "dsa"]),
        ({"index_topk_freq": 2}, ["dsa", "dsa", "dsa_shared", "dsa"]),
        ({"index_topk_freq": 3, "index_skip_topk_offset": 1}, ["dsa", "dsa_shared", "dsa_shared", "dsa"]),
    ],
)
def test_glm_5_says_in_three_ways_which_layers_choose(
    fields: dict, expected: list[str], tmp_path: Path
) -> None:
    config = small_architecture([*PLAIN, *MIXERS["glm_moe_dsa"], "model.depth=4", "moe.shared_hidden=16"])
    save_pretrained(random_model(config, torch.float32), tmp_path / "x", model_type="glm_moe_dsa")
    path = tmp_path / "x" / "config.json"
    written = json.loads(path.read_text())
    del written["indexer_types"]
    path.write_text(json.dumps(written | fields))
    found = read_config(HubDirectory(tmp_path / "x"), families()["glm_moe_dsa"])
    assert [layer.mixer for layer in found.layers] == expected


@pytest.mark.parametrize(
    ("model_type", "overrides", "name"),
    [
        ("deepseek_v4", DEEPSEEK_V4, "mtp.0.e_proj.weight"),
        ("longcat_flash", [*LONGCAT, "moe.num_zero_experts=2"], "model.mtp.layers.0.eh_proj.weight"),
    ],
)
def test_modules_of_another_form_are_left_out(
    model_type: str, overrides: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(small_architecture(overrides), torch.float32)
    save_pretrained(model, tmp_path / "x", model_type=model_type)
    path = tmp_path / "x" / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(3)}, path, metadata={"format": "pt"})
    again = load_pretrained(tmp_path / "x")
    assert "leaves out 1 tensors" in capsys.readouterr().out
    for (key, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
