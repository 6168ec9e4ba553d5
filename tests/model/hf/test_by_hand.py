"""What transformers drops or never writes, by the names and rules of the published code."""

import json
from pathlib import Path

import pytest

from conf.errors import CheckpointError
from model.hf.families import gqa, qwen3_next
from model.hf.fields import Fields
from model.hf.files import HubDirectory
from model.layout import expand


@pytest.mark.parametrize(
    ("step", "only", "kinds"),
    [(1, [], "mmmmmm"), (2, [], "dmdmdm"), (3, [], "ddmddm"), (1, [1], "mdmmmm"), (2, [1], "dddmdm")],
)
@pytest.mark.parametrize(
    "read", [gqa.qwen3_moe_layers, qwen3_next.read_more], ids=["qwen3_moe", "qwen3_next"]
)
def test_qwen_counts_layers_with_experts_from_one(read, step: int, only: list[int], kinds: str) -> None:
    found = {"num_hidden_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    found |= {"decoder_sparse_step": step, "mlp_only_layers": only, "rope_theta": 1e4}
    lines = read(Fields(found, "config.json"))
    pattern = [line for line in lines if line.startswith("layout.ffn.pattern=")][-1].partition("=")[2]
    # Layer n, counted from one, has experts where the step divides n and no list makes it dense.
    assert expand(pattern.strip("'\""), "", "", 6) == tuple(
        {"d": "dense", "m": "moe"}[kind] for kind in kinds
    )


@pytest.mark.parametrize("file", ["../other.safetensors", "/tmp/other.safetensors", "part/other.safetensors"])
def test_an_index_names_files_of_its_own_directory_alone(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match=f"x is said to be in '{file}'"):
        HubDirectory(tmp_path)
