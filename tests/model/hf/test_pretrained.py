"""Checkpoint directories that are not what they say, and conversions that never hold the model."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.compose import compose
from conf.errors import CheckpointError, ConfigError
from conf.tokenizer_files import TOKENIZER_DIGEST
from model.config import Architecture
from model.hf.__main__ import main
from model.hf.convert import convert
from model.hf.files import HubDirectory
from model.hf.pretrained import family_for, load_pretrained, save_pretrained, used
from model.language_model import LanguageModel
from tests.architectures import random_model, small_architecture

MIXTRAL = [
    *("layout=attn", "moe=softmax", "residual=pre_norm", "residual.has_zero_centered_norm=false"),
    *("mixer.attn.output_gate=none", "mixer.attn.qk_norm=none", "mixer.attn.rotary_dim=8"),
    *("moe.shared_hidden=0", "moe.has_shared_gate=false", "model.depth=2"),
]
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def without_biases(model: LanguageModel) -> LanguageModel:
    for router in model.routers():
        router.bias.zero_()
    return model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three shards and their index."""
    model = without_biases(random_model(small_architecture(MIXTRAL), torch.float32))
    save_pretrained(model, tmp_path / "hub", model_type="mixtral", shard_bytes=40_000)
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) >= 3
    return tmp_path / "hub"


def shard_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def change_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = shard_of(directory, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path)


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(directory)
    return str(caught.value)


def test_the_directory_loads_before_it_is_damaged(directory: Path) -> None:
    assert sum(p.numel() for p in load_pretrained(directory).parameters()) > 0


def test_a_missing_shard(directory: Path) -> None:
    path = shard_of(directory, EXPERT)
    path.unlink()
    assert path.name in refusal(directory)


@pytest.mark.parametrize("keeps", [0, 7, 0.5])
def test_a_truncated_shard(directory: Path, keeps: float) -> None:
    path = shard_of(directory, EXPERT)
    content = path.read_bytes()
    path.write_bytes(content[: int(keeps if keeps != 0.5 else len(content) * keeps)])
    assert path.name in refusal(directory)


def test_a_misshaped_tensor(directory: Path) -> None:
    change_tensor(directory, EXPERT, lambda x: x[:, 1:].contiguous())
    said = refusal(directory)
    assert f"{EXPERT} (found [32, 15], expected [32, 16])" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_that_is_no_plain_number(directory: Path, dtype: torch.dtype) -> None:
    change_tensor(directory, EXPERT, lambda x: x.to(dtype))
    said = refusal(directory)
    assert EXPERT in said
    assert "dequantise" in said


def test_a_lost_expert(directory: Path) -> None:
    path = shard_of(directory, EXPERT)
    tensors = load_file(path)
    del tensors[EXPERT]
    save_file(tensors, path)
    index = directory / "model.safetensors.index.json"
    assert EXPERT in refusal(directory)
    change_json(index, lambda content: content["weight_map"].pop(EXPERT))
    assert f"missing tensors: {EXPERT}" in refusal(directory)


def test_an_expert_too_many(directory: Path) -> None:
    path = shard_of(directory, EXPERT)
    tensors = load_file(path)
    more = EXPERT.replace("experts.3", "experts.8")
    tensors[more] = tensors[EXPERT].clone()
    save_file(tensors, path)
    change_json(
        directory / "model.safetensors.index.json",
        lambda content: content["weight_map"].update({more: path.name}),
    )
    assert f"unexpected tensors: {more}" in refusal(directory)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "mixtrall"}, "did you mean mixtral?"),
        ({"model_type": None}, "model_type"),
        ({"attention_sinks": True}, "unknown fields attention_sinks"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "thirty"}, "hidden_size is 'thirty'; expected a whole number"),
        ({"num_local_experts": 0}, "moe.num_experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ],
)
def test_a_config_of_something_else(directory: Path, fields: dict[str, Any], said: str) -> None:
    change_json(directory / "config.json", lambda content: content.update(fields))
    assert said in refusal(directory)


def test_a_config_without_what_says_its_size(directory: Path) -> None:
    change_json(directory / "config.json", lambda content: content.pop("hidden_size"))
    assert "lacks hidden_size" in refusal(directory)


def test_a_config_that_is_no_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(directory)


def test_an_index_that_points_elsewhere(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    change_json(index, lambda content: content["weight_map"].update({EXPERT: "../../secret.safetensors"}))
    assert "../../secret.safetensors" in refusal(directory)


def in_both_forms(directory: Path) -> None:
    """Adds a single file whose values are all other ones."""
    tensors = {name: tensor + 1 for name, tensor in HubDirectory(directory).tensors()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_of_two_forms_the_one_that_transformers_reads(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    in_both_forms(directory)
    (directory / "consolidated.safetensors").touch()
    ours = load_pretrained(directory)
    said = capsys.readouterr().out
    assert "reads model.safetensors; passes over consolidated.safetensors, model-00001-of-" in said
    assert "model.safetensors.index.json" in said
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert torch.equal(ours.head.weight, theirs.lm_head.weight)
    for path in [*directory.glob("model-*"), *directory.glob("*.index.json"), *directory.glob("cons*")]:
        path.unlink()
    load_pretrained(directory)
    assert "passes over" not in capsys.readouterr().out


def test_two_forms_that_disagree_are_refused(directory: Path) -> None:
    in_both_forms(directory)
    change_json(
        directory / "model.safetensors.index.json",
        lambda content: content["weight_map"].update({"more": content["weight_map"].pop(EXPERT)}),
    )
    said = refusal(directory)
    assert f"only model.safetensors has {EXPERT}; only model.safetensors.index.json has more" in said
    assert "delete the form that is not meant" in said


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_refused_and_not_run(directory: Path, tmp_path: Path, name: str) -> None:
    for path in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        path.unlink()
    (directory / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert name in refusal(directory)
    assert not (tmp_path / "ran").exists()


def same_tensors(first: Path, second: Path) -> bool:
    a, b = (dict(HubDirectory(path).tensors()) for path in (first, second))
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_give_the_same_directory(directory: Path, tmp_path: Path, dtype) -> None:
    model = load_pretrained(directory, dtype)
    save_pretrained(model, tmp_path / "hub2", model_type="mixtral")
    main(["import", str(tmp_path / "hub2"), str(tmp_path / "ours")])
    main(["export", str(tmp_path / "ours"), str(tmp_path / "again"), "shard_gb=0.00001"])
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert same_tensors(tmp_path / "hub2", tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hub2", "again")]
    assert configs[0] == configs[1]
    loaded = load_pretrained(tmp_path / "ours", dtype)
    for (key, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_the_digest_of_the_tokenizer_goes_wherever_weights_go(directory: Path, tmp_path: Path) -> None:
    assert HubDirectory(directory).tokenizer_digest is None
    convert(directory, tmp_path / "none", model_type="weft")
    assert not (tmp_path / "none" / TOKENIZER_DIGEST).exists()
    save_pretrained(load_pretrained(directory), tmp_path / "hub2", tokenizer_digest="0f" * 32)
    main(["import", str(tmp_path / "hub2"), str(tmp_path / "ours")])
    main(["export", str(tmp_path / "ours"), str(tmp_path / "again"), "shard_gb=0.00001"])
    for name in ("hub2", "ours", "again"):
        assert HubDirectory(tmp_path / name).tokenizer_digest == "0f" * 32, name
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    theirs.save_pretrained(tmp_path / "theirs")
    assert HubDirectory(tmp_path / "theirs").tokenizer_digest is None


def test_a_model_of_no_family_goes_through_our_own_form(tmp_path: Path) -> None:
    overrides = ["layout.pattern=gdn mamba nsa csa", "layout.ffn.pattern=moe hash", "residual=hyper"]
    model = random_model(small_architecture(overrides), torch.float32)
    for router in model.routers():
        router.reset_buffers()
    with pytest.raises(CheckpointError, match="no family holds this architecture"):
        save_pretrained(model, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    save_pretrained(model, tmp_path / "ours", model_type="weft")
    loaded = load_pretrained(tmp_path / "ours")
    assert used(loaded.config) == used(model.config)
    for (key, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_what_a_family_cannot_hold_is_not_dropped(tmp_path: Path) -> None:
    model = random_model(small_architecture(MIXTRAL), torch.float32)
    with pytest.raises(CheckpointError, match=r"no place for blocks.0.moe.router.bias, .* not zero"):
        save_pretrained(model, tmp_path / "hub", model_type="mixtral")
    save_pretrained(model, tmp_path / "ours", model_type="weft")
    with pytest.raises(CheckpointError, match=r"no place for blocks.0.moe.router.bias, .* not zero"):
        convert(tmp_path / "ours", tmp_path / "hub", model_type="mixtral")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_an_existing_directory_is_left_alone(directory: Path) -> None:
    before = sorted(directory.iterdir())
    with pytest.raises(CheckpointError, match="exists"):
        convert(directory, directory)
    assert sorted(directory.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "write python -m model.hf import"),
        (["import", "a"], "write python -m model.hf import"),
        (["improt", "a", "b"], "write python -m model.hf import"),
        (["import", "a", "b", "dtyp=bfloat16"], "did you mean dtype?"),
        (["import", "a", "b", "model_type=mixtral"], "read from the directory"),
    ],
)
def test_a_mistyped_command(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(arguments)
    assert said in str(caught.value)


def test_an_unknown_family_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean olmoe"):
        main(["export", str(directory), str(tmp_path / "x"), "model_type=olmo"])


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("qwen3_next_small", "qwen3_next"),
        ("qwen3_5_small", "qwen3_next"),
        ("kimi_k2_small", "deepseek_v3"),
        ("minimax_text_01_small", "minimax"),
        ("mixtral_small", "mixtral"),
        ("olmoe_small", "olmoe"),
    ],
)
def test_the_family_that_is_chosen_where_several_hold_a_model(model: str, family: str) -> None:
    assert family_for(compose([f"model={model}"], Architecture), None)[0].model_type == family
