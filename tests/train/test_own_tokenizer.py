"""A tokenizer and a dataset of the user's own, from documents to what transformers opens."""

from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError, DataError
from data.prepare import prepare
from tests.qwen_like import SIZE, write_qwen_like
from tests.train.conftest import Corpus
from tests.train.runs import TINY, run_to_end
from train.config.load import load_config
from train.config.run_config import RunConfig
from train.evaluate import main as evaluate
from train.export import main as export
from train.sample import main as sample

IDS = SIZE + 4
MODEL = ("model=qwen3_next_small", "model.width=32", "moe.num_experts=4", "moe.hidden=16", "moe.top_k=2")
RUN = [
    line for line in TINY if line.startswith(("train.", "checkpoint", "track", "optim", "schedule", "sample"))
]


@pytest.fixture(scope="module")
def dataset(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    tokenizer = f"data.tokenizer.model={write_qwen_like(root / 'qwen')}"
    keys = (
        "data=text",
        f"data.corpora.documents.source={corpus.tree}",
        "data.workers=0",
        "data.held_out=0.15",
    )
    config = load_config([*keys, tokenizer, f"data.directory={root / 'dataset'}"], 1)
    prepare(config.data, progress=False)
    return root / "dataset"


def load(dataset: Path, *more: str) -> RunConfig:
    return load_config([f"data.directory={dataset}", *more], 1)


def test_a_dataset_brings_its_corpora_and_its_vocabulary(dataset: Path, tmp_path: Path) -> None:
    found = load(dataset, "model.vocab_size=1000").data
    assert list(found.corpora) == ["documents"]
    assert (found.corpora["documents"].kind, found.held_out) == ("text", 0.15)
    assert load(dataset, "data.corpora.documents.weight=3").data.weights == {"documents": 3.0}
    assert load(dataset, "data.corpora.documents.epochs=3").data.epochs == {"documents": 3.0}
    # The default model has more rows than ids; a smaller one gets as many as are needed.
    assert load(dataset).model.vocab_size == 4096
    values = tmp_path / "small.yaml"
    values.write_text("model: {width: 32}\n")
    small = (f"config={values}", "train.vocab_multiple=5000")
    assert load(dataset, *small).model.vocab_size == 4096
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 64 rows cannot hold the 374"):
        load(dataset, "model.vocab_size=64")


def test_a_model_with_too_few_rows_gets_as_many_as_the_tokenizer_needs(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = Path("conf/model/qwen3_next_small.yaml").read_text()
    assert "vocab_size: 4096" in text
    (tmp_path / "model" / "few.yaml").write_text(text.replace("vocab_size: 4096", "vocab_size: 256"))
    few = (f"hydra.searchpath=[file://{tmp_path}]", "model=few")
    assert load(dataset, *few).model.vocab_size == 384
    assert load(dataset, *few, "train.vocab_multiple=1").model.vocab_size == IDS
    assert load(dataset, *few, "model.vocab_size=400").model.vocab_size == 400


def test_a_damaged_dataset_is_said(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_bytes((dataset / "card.json").read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged card"):
        load(tmp_path)


def test_from_documents_to_transformers(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    keys = [*MODEL, *RUN, f"data.directory={dataset}", "data.sequence_length=64", f"run.dir={run}"]
    assert run_to_end([*keys, "train.steps=30"]) == 0
    evaluate([f"run={run}"])
    prompt, tokens = "apples 3 plus figs 4", 12
    capfd.readouterr()
    sample([f"run={run}", f"prompt='{prompt}'", f"tokens={tokens}", "temperature=0"])
    ours = capfd.readouterr().out.removesuffix("\n")
    # The dataset is gone by then.
    dataset.rename(dataset.with_name("gone"))
    try:
        export([f"run={run}", f"to={tmp_path / 'hub'}"])
    finally:
        dataset.with_name("gone").rename(dataset)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    continued = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    assert tokenizer.decode(continued[0], skip_special_tokens=True) == ours
    assert len(ours) > len(prompt)
    assert (model.config.eos_token_id, model.config.bos_token_id) == (SIZE, None)
    assert (model.config.max_position_embeddings, len(tokenizer)) == (64, IDS)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert model.generation_config.eos_token_id == SIZE
