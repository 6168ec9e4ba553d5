import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from conf.compose import CONF_DIR, validate
from conf.errors import ConfigError
from data.config import DataConfig

OPTIONS = sorted((CONF_DIR / "data").glob("*.yaml"))
TEXT = {"kind": "text", "source": "a.txt"}
JSONL = {"kind": "jsonl", "source": "a.jsonl", "field": "text"}
HUB = {"kind": "hub", "source": "owner/name", "field": "text", "split": "train"}


def settings(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "directory": "corpora/x",
        "sequence_length": 512,
        "corpora": {"web": dict(TEXT)},
        "tokenizer": {"vocab_size": 4096},
        "held_out": 0.0,
        "workers": 1,
        "max_bad_documents": 0,
        "verify": False,
    }
    return plain | changes


def test_config_and_worker_import_nothing_heavy() -> None:
    heavy = "{'torch', 'datasets', 'megatron', 'transformers'}"
    light = heavy[:-1] + ", 'sentencepiece', 'numpy'}"
    code = (
        f"import sys; import data.config; assert not {light} & set(sys.modules); "
        f"import data.prepare, data.shards; assert not {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF_DIR.parent)


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_option_is_valid_once_its_missing_values_are_given(path: Path) -> None:
    tree = OmegaConf.load(path)
    if path.stem != "stdlib":
        with pytest.raises(MissingMandatoryValue, match="directory"):
            OmegaConf.to_container(tree, throw_on_missing=True)
        OmegaConf.update(tree, "directory", "corpora/mine")
        with pytest.raises(MissingMandatoryValue, match=r"corpora\.documents\.source"):
            OmegaConf.to_container(tree, throw_on_missing=True)
        OmegaConf.update(tree, "corpora.documents.source", "somewhere")
    if path.stem == "megatron":
        with pytest.raises(MissingMandatoryValue, match=r"tokenizer\.model"):
            OmegaConf.to_container(tree, throw_on_missing=True)
        OmegaConf.update(tree, "tokenizer.model", "theirs")
    plain = OmegaConf.to_container(tree, throw_on_missing=True)
    assert isinstance(plain, dict)
    config = validate(DataConfig, {str(key): value for key, value in plain.items()})
    assert all(corpus.kind == path.stem or path.stem == "stdlib" for corpus in config.corpora.values())


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_key_of_every_option_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith("#") or ":" not in line or line.strip() in ("corpora:", "tokenizer:"):
            continue
        assert lines[number - 1].strip().startswith("#"), f"{path.name}:{number + 1}: {line}"


def test_the_default_is_what_the_readme_promises() -> None:
    plain = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "data" / "stdlib.yaml"))
    config = DataConfig.model_validate(plain)
    assert config.directory == "corpora/stdlib"
    assert config.sequence_length == 1024
    assert config.tokenizer.vocab_size == 4096
    assert config.held_out == 0.02


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"sequence_length": 7}, "sequence_length", "greater than or equal to 8"),
        ({"held_out": 0.5}, "held_out", "less than 0.5"),
        ({"held_out": -0.1}, "held_out", "greater than or equal to 0"),
        ({"workers": -1}, "workers", "greater than or equal to 0"),
        ({"corpora": {}}, "corpora", "at least 1"),
        ({"corpora": {"../x": TEXT}}, "corpora", "names a file"),
        ({"corpora": {"held_out": TEXT}}, "corpora", "taken"),
        ({"corpora": {"w": {**TEXT, "weight": 0.0}}}, "corpora.w.weight", "greater than 0"),
        ({"corpora": {"w": {**TEXT, "weight": -1.0}}}, "corpora.w.weight", "greater than 0"),
        ({"corpora": {"w": {**TEXT, "weight": float("nan")}}}, "corpora.w.weight", "finite"),
        ({"corpora": {"w": {**TEXT, "weight": float("inf")}}}, "corpora.w.weight", "finite"),
        ({"corpora": {"w": {**TEXT, "kind": "csv"}}}, "corpora.w.kind", "'parquet'"),
        ({"corpora": {"w": {**TEXT, "field": "text"}}}, "corpora.w", "set field=null"),
        ({"corpora": {"w": {**TEXT, "split": "train"}}}, "corpora.w", "set split=null"),
        ({"corpora": {"w": {**TEXT, "suffixes": ["py"]}}}, "corpora.w.suffixes", "look like .py"),
        ({"corpora": {"w": {**JSONL, "field": None}}}, "corpora.w", "needs field"),
        ({"corpora": {"w": {**JSONL, "suffixes": [".x"]}}}, "corpora.w", "set suffixes=[]"),
        ({"corpora": {"w": {**JSONL, "source": "stdlib"}}}, "corpora.w", "set kind=code"),
        ({"corpora": {"w": {**HUB, "split": None}}}, "corpora.w", "needs split"),
        ({"corpora": {"w": {**TEXT, "source": ""}}}, "corpora.w.source", "at least 1"),
        ({"tokenizer": {"vocab_size": 383}}, "tokenizer", "less than the 384 ids"),
        ({"tokenizer": {"vocab_size": 500, "train_bytes": 1}}, "tokenizer.train_bytes", "equal to 1000"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(DataConfig, settings(**changes))
    assert [violation.key for violation in error.value.violations] == [key]
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_fit_are_accepted() -> None:
    corpora = {"a": TEXT, "b": JSONL, "c": HUB, "d": {"kind": "code", "source": "stdlib", "weight": 2.0}}
    config = validate(DataConfig, settings(corpora=corpora))
    assert config.weights == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 2.0}
