"""Weights from elsewhere, and back: a run begins from them, its last checkpoint becomes them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError
from model.hf.pretrained import load_pretrained, save_pretrained
from tests.architectures import random_model
from tests.train.conftest import Corpus
from tests.train.runs import log_path, metrics_of, model_of, run_to_end
from train.config.load import load_config, open_run
from train.config.run_config import RunConfig
from train.export import main as export
from train.loop.sweep import checked_jobs

ROOT = Path(__file__).parents[2]
# Learning rates this small leave the weights where they began.
STILL = (
    "optim.lr=1e-30",
    "optim.weight_decay=0.0",
    "train.steps=1",
    "moe.bias_rate=0.0",
    "residual.dropout=0.0",
)


def config_of(corpus: Corpus, *more: str) -> RunConfig:
    return load_config(corpus.overrides(Path("unused"), *more), 1)


def write_weights(config: RunConfig, directory: Path, peak: float = 1.0) -> dict[str, torch.Tensor]:
    """Random weights; `peak` above 1 makes attention differ between keys."""
    torch.manual_seed(0)
    model = random_model(config.architecture, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mixer.q_proj.weight"):
                parameter *= peak
    save_pretrained(model, directory, model_type="weft")
    return model.state_dict()


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_begins_from_weights_and_is_exported_again(corpus: Corpus, tmp_path: Path, size: int) -> None:
    given = write_weights(config_of(corpus), tmp_path / "given")
    overrides = corpus.overrides(tmp_path / "run", f"train.start={tmp_path}/given", *STILL)
    assert run_to_end(overrides, size) == 0
    assert f"began from {tmp_path}/given" in log_path(overrides).read_text()
    export([f"run={tmp_path}/run", f"to={tmp_path}/after", "model_type=weft"])
    after = load_pretrained(tmp_path / "after").state_dict()
    assert after.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(after[name], tensor), name


def test_weights_bring_their_architecture_and_typed_keys_change_it(corpus: Corpus, tmp_path: Path) -> None:
    config = config_of(corpus, "model.depth=3", "layout.pattern=mla", "mixer.mla.latent_dim=14")
    write_weights(config, tmp_path / "given")
    start = f"train.start={tmp_path}/given"
    plain = [f"data.directory={corpus.dataset}", "data.tokenizer.vocab_size=400", start]
    found = load_config(plain, 1)
    assert found.layers == config.layers
    assert found.mixer["mla"] == config.mixer["mla"]
    # What refers to a field of the weights follows it.
    assert load_config([*plain, "layout=dsa"], 1).mixer["dsa"].latent_dim == 14
    assert load_config([*plain, "layout=dsa"], 1).layers[0].mixer == "dsa"
    assert load_config([*plain, "model.depth=2"], 1).model.depth == 2
    assert load_config([*plain, "model=mixtral_small", "train.micro_batch=null"], 1).layers[0].mixer == "attn"


@pytest.mark.parametrize(
    "words",
    [
        ["+train.start={given}"],
        ["train.start='{given}'"],
        ["train={{start: {given}, seed: 3}}"],
        ["train.start=${{oc.env:GIVEN}}"],
        ["sample.prompt={given}", "train.start=${{sample.prompt}}"],
        ["train.start=nowhere", "train.start={given}"],
    ],
    ids=["plus", "quotes", "mapping", "environment", "reference", "last"],
)
def test_weights_are_those_of_the_composed_config(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    config = config_of(corpus, "model.depth=3", "layout.pattern=mla")
    write_weights(config, tmp_path / "weights")
    monkeypatch.setenv("GIVEN", f"{tmp_path}/weights")
    start = [word.format(given=f"{tmp_path}/weights") for word in words]
    found = load_config([*start, "data.tokenizer.vocab_size=400"], 1)
    assert found.layers == config.layers
    assert found.train.start == f"{tmp_path}/weights"


def test_text_that_looks_like_the_key_is_no_start(corpus: Corpus, tmp_path: Path) -> None:
    write_weights(config_of(corpus, "model.depth=3"), tmp_path / "weights")
    start = f"train.start={tmp_path}/weights"
    plain = load_config([], 1)
    for words in ([start, "train.start=null"], [f"sample.prompt='{start}'"]):
        assert load_config(words, 1).layers == plain.layers
    # Any way to choose a model stands against the model of the weights.
    chosen = load_config([start, "+model=mixtral_small", "data.tokenizer.vocab_size=400"], 1)
    assert {layer.mixer for layer in chosen.layers} == {"attn"}


def test_a_start_that_depends_on_its_own_model_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    write_weights(config_of(corpus, "model.depth=3"), tmp_path / "of_4")
    with pytest.raises(ConfigError, match=r"brings a model with which it would be .*of_3"):
        load_config([f"train.start={tmp_path}/of_${{model.depth}}"], 1)


def tree_with_recipe(root: Path, text: str) -> Path:
    """This repository, by links, with one recipe more: `own`."""
    for package in ("kernels", "data", "model", "parallel", "train"):
        (root / package).symlink_to(ROOT / package)
    shutil.copytree(ROOT / "conf", root / "conf")
    (root / "conf/recipe/own.yaml").write_text(f"# @package _global_\n# A start.\n{text}")
    return root


def test_a_recipe_names_the_weights(corpus: Corpus, tmp_path: Path) -> None:
    config = config_of(corpus, "model.depth=3", "layout.pattern=mla")
    write_weights(config, tmp_path / "weights")
    (tmp_path / "tree").mkdir()
    text = f"train:\n  start: {tmp_path}/weights\n"
    tree = tree_with_recipe(tmp_path / "tree", text)
    command = [sys.executable, "-m", "train.resolve", "recipe=own", "data.tokenizer.vocab_size=400"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model"]["depth"], found["layout"]["pattern"]) == (3, "mla")


def test_each_run_of_a_sweep_has_the_model_of_its_weights(corpus: Corpus, tmp_path: Path) -> None:
    for depth in (3, 5):
        write_weights(config_of(corpus, f"model.depth={depth}"), tmp_path / f"of_{depth}")
    swept = ["data.tokenizer.vocab_size=400", "sample.prompt=3,5"]
    for start in (f"{tmp_path}/of_3,{tmp_path}/of_5", f"{tmp_path}/of_${{sample.prompt}}"):
        words = [*swept[: 2 if "sample" in start else 1], f"train.start={start}"]
        jobs = checked_jobs([word.replace("prompt=3,5", "prompt='3','5'") for word in words])
        assert [job.config.model.depth for job in jobs] == [3, 5]


@pytest.mark.slow
def test_hydras_own_line_has_the_model_of_the_weights(corpus: Corpus, tmp_path: Path) -> None:
    for depth in (1, 2):
        write_weights(config_of(corpus, f"model.depth={depth}"), tmp_path / f"of_{depth}")

    def line(*words: str) -> str:
        rest = [word for word in corpus.overrides(tmp_path / "run", "train.steps=1") if "depth" not in word]
        command = [sys.executable, "-m", "train", *rest, *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = line(f"train.start={tmp_path}/of_1", "--cfg", "job", "-p", "model")
    assert "\ndepth: 1\n" in f"\n{shown}"
    line("-m", "hydra/launcher=basic", f"train.start={tmp_path}/of_1,{tmp_path}/of_2")
    for number, depth in ((0, 1), (1, 2)):
        found = json.loads((tmp_path / f"run/{number}/config.json").read_text())
        assert (found["model"]["depth"], found["train"]["start"]) == (depth, f"{tmp_path}/of_{depth}")


def test_a_restart_goes_on_from_its_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    write_weights(config_of(corpus), tmp_path / "given")
    overrides = corpus.overrides(tmp_path / "run", f"train.start={tmp_path}/given", "train.steps=9")
    assert run_to_end(overrides) == 0
    whole = metrics_of(tmp_path / "run")
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000004").rename(
        tmp_path / "again" / "checkpoints" / "step_00000004"
    )
    again = corpus.overrides(tmp_path / "again", f"train.start={tmp_path}/given", "train.steps=9")
    assert run_to_end(again) == 0
    assert "resume step 4/" in log_path(again).read_text()
    assert metrics_of(tmp_path / "again") == whole[4:]


def test_new_parameters_keep_their_first_values_only_where_asked(corpus: Corpus, tmp_path: Path) -> None:
    write_weights(config_of(corpus, "layout.pattern=mla"), tmp_path / "given")
    start = (f"train.start={tmp_path}/given", "layout.pattern=dsa", *STILL)
    refused = corpus.overrides(tmp_path / "refused", *start)
    assert run_to_end(refused) == 66
    said = log_path(refused).read_text()
    assert "missing tensors: blocks.0.mixer.index_" in said
    assert "train.fresh" in said
    allowed = corpus.overrides(tmp_path / "run", *start, "train.fresh=['*.index_*']")
    assert run_to_end(allowed) == 0


def test_indexers_warm_up_while_the_rest_is_frozen(corpus: Corpus, tmp_path: Path) -> None:
    write_weights(config_of(corpus, "layout.pattern=mla"), tmp_path / "given", peak=20.0)
    recipe = (
        *(f"train.start={tmp_path}/given", "layout.pattern=dsa", "recipe=dsa_warmup", "optim.lr=0.02"),
        *("train.steps=60", "train.global_batch=4", "residual.dropout=0.0"),
    )
    assert run_to_end(corpus.overrides(tmp_path / "warm", *recipe, "moe.bias_rate=0.0")) == 0
    config = open_run(str(tmp_path / "warm"))
    assert config.mixer["dsa"].index_stage == "dense"
    model = model_of(tmp_path / "warm")
    given = load_pretrained(tmp_path / "given").state_dict()
    for name, tensor in model.state_dict().items():
        if ".index_" not in name:
            assert torch.equal(tensor, given[name]), name
    losses = [line["loss/index"] for line in metrics_of(tmp_path / "warm")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), (losses[:5], losses[-5:])
    export([f"run={tmp_path}/warm", f"to={tmp_path}/warmed", "model_type=weft"])
    sparse = (f"train.start={tmp_path}/warmed", "recipe=dsa_sparse", "optim.lr=0.003", "train.steps=8")
    assert run_to_end(corpus.overrides(tmp_path / "sparse", "layout.pattern=dsa", *sparse)) == 0
    assert open_run(str(tmp_path / "sparse")).mixer["dsa"].index_stage == "selected"
    lines = metrics_of(tmp_path / "sparse")
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        (json.dumps({"model_type": "mixtral"}), "python -m model.hf import"),
        (json.dumps({"architecture": {"model": {"widht": 3}}}), "did you mean model.width?"),
    ],
)
def test_a_start_that_is_not_ours(corpus: Corpus, tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(corpus.overrides(tmp_path / "run", f"train.start={tmp_path}"), 1)
    assert said in str(caught.value)
