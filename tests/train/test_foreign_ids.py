"""Weights of one tokenizer never meet ids of another unnoticed: the digest goes wherever weights go."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import CheckpointError, ConfigError
from conf.tokenizer_files import SENTENCEPIECE, TOKENIZER_DIGEST, TOKENIZER_JSON
from data.card import read_card
from data.prepare import prepare
from model.hf.files import HubDirectory
from tests.train.conftest import Corpus
from tests.train.runs import log_path, run_to_end
from train.checkpoint.foreign_ids import Ids, compare_ids
from train.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from train.checkpoint.records import read_record, write_record
from train.checkpoint.run_tokenizer import read_tokenizer
from train.config.load import load_config
from train.evaluate import main as evaluate
from train.export import main as export
from train.sample import main as sample

FEW = ("train.steps=2", "train.final_rows=2")


def digest_of(corpus: Corpus) -> str:
    return read_card(corpus.dataset).tokenizer.digest


@pytest.fixture(scope="module")
def foreign(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Every text backwards, with a tokenizer of its own of as many pieces."""
    root = tmp_path_factory.mktemp("foreign")
    (root / "tree").mkdir()
    for path in corpus.tree.iterdir():
        (root / "tree" / path.name).write_text(path.read_text()[::-1])
    found = Corpus(root / "tree", root / "dataset")
    prepare(load_config(found.overrides(root / "run"), 1).data, progress=False)
    assert read_card(found.dataset).tokenizer.vocab_size == read_card(corpus.dataset).tokenizer.vocab_size
    assert digest_of(found) != digest_of(corpus)
    return found


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and its weights in our own form beside it."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert run_to_end(corpus.overrides(directory, *FEW)) == 0
    export([f"run={directory}", f"to={directory.parent}/weights", "model_type=weft"])
    return directory


def moved_to(run: Path, corpus: Corpus, target: Path) -> Path:
    """A copy of a run whose data directory holds another dataset."""
    shutil.copytree(run, target)
    config = read_record(target / "config.json") or {}
    config["data"]["directory"] = str(corpus.dataset)
    config["data"]["corpora"]["documents"]["source"] = str(corpus.tree)
    write_record(target / "config.json", config)
    return target


def without_digest(run: Path, target: Path) -> Path:
    """A copy of a run as it was written before checkpoints had the digest, and configs the key."""
    shutil.copytree(run, target)
    (checkpoint,) = (target / "checkpoints").iterdir()
    manifest = read_manifest(checkpoint)
    del manifest["extra"]["tokenizer"]
    fields = {key: value for key, value in manifest.items() if key not in ("format", "sha256")}
    (checkpoint / MANIFEST).write_bytes(encode_manifest(fields))
    config = read_record(target / "config.json") or {}
    del config["train"]["foreign_ids"], config["version"]
    write_record(target / "config.json", config)
    return target


digests = st.sampled_from(["a" * 64, "b" * 64, "c" * 64])


@given(st.none() | digests, digests, st.booleans())
def test_ids_agree_or_something_is_said(weights: str | None, data: str, are_meant: bool) -> None:
    sides = Ids("weights", weights), Ids("data", data)
    if weights not in (None, data) and not are_meant:
        with pytest.raises(ConfigError) as caught:
            compare_ids(*sides, "train.start", "do this")
        said = str(caught.value)
        assert said.startswith("train.start: ")
        assert said.endswith("do this")
        assert str(weights) in said
        assert data in said
        return
    said = compare_ids(*sides, "train.start", "do this", are_meant=are_meant)
    assert (said is None) == (weights == data)
    assert said is None or data in said


def test_a_checkpoint_and_its_export_carry_the_digest(corpus: Corpus, finished: Path) -> None:
    (checkpoint,) = (finished / "checkpoints").iterdir()
    assert read_manifest(checkpoint)["extra"]["tokenizer"] == digest_of(corpus)
    assert HubDirectory(finished.parent / "weights").tokenizer_digest == digest_of(corpus)


def test_weights_of_another_tokenizer_are_refused_until_they_are_meant(
    corpus: Corpus, foreign: Corpus, finished: Path, tmp_path: Path
) -> None:
    start = f"train.start={finished.parent}/weights"
    refused = foreign.overrides(tmp_path / "refused", start, *FEW)
    assert run_to_end(refused) == 64
    said = log_path(refused).read_text()
    assert "error: train.start: " in said
    assert digest_of(corpus) in said
    assert digest_of(foreign) in said
    assert "data.tokenizer.model" in said
    assert "train.foreign_ids=true" in said
    meant = foreign.overrides(tmp_path / "meant", start, *FEW, "train.foreign_ids=true")
    assert run_to_end(meant) == 0
    assert f"ids of the tokenizer with sha256 {digest_of(corpus)}" in log_path(meant).read_text()
    export([f"run={tmp_path}/meant", f"to={tmp_path}/weights", "model_type=weft"])
    assert HubDirectory(tmp_path / "weights").tokenizer_digest == digest_of(foreign)


def test_weights_without_a_digest_start_and_say_so(foreign: Corpus, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "weights", tmp_path / "weights")
    for name in (TOKENIZER_DIGEST, TOKENIZER_JSON, SENTENCEPIECE):
        (tmp_path / "weights" / name).unlink()
    overrides = foreign.overrides(tmp_path / "run", f"train.start={tmp_path}/weights", *FEW)
    assert run_to_end(overrides) == 0
    (line,) = [x for x in log_path(overrides).read_text().splitlines() if "could not be compared" in x]
    assert line.startswith(f"{tmp_path}/weights: carries no digest of its tokenizer")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"sha256": "abc"}', None])
def test_a_damaged_digest_is_no_missing_one(finished: Path, tmp_path: Path, content: str | None) -> None:
    shutil.copytree(finished.parent / "weights", tmp_path / "weights")
    path = tmp_path / "weights" / TOKENIZER_DIGEST
    path.unlink()
    if content is None:
        path.symlink_to(tmp_path / "gone")
    else:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=TOKENIZER_DIGEST):
        HubDirectory(tmp_path / "weights")


def test_a_run_does_not_go_on_with_another_tokenizer(
    corpus: Corpus, foreign: Corpus, finished: Path, tmp_path: Path
) -> None:
    moved = moved_to(finished, foreign, tmp_path / "run")
    overrides = foreign.overrides(moved, *FEW)
    assert run_to_end(overrides) == 64
    assert read_tokenizer(moved, tmp_path / "no dataset", digest_of(corpus)) is not None
    said = log_path(overrides).read_text()
    assert "error: data.directory: " in said
    assert digest_of(corpus) in said
    assert digest_of(foreign) in said


@pytest.mark.parametrize(("command", "more"), [(evaluate, "rows=2"), (sample, "tokens=2")])
def test_a_model_is_not_read_with_another_tokenizer(
    corpus: Corpus, foreign: Corpus, finished: Path, tmp_path: Path, command, more: str
) -> None:
    moved = moved_to(finished, foreign, tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        command([f"run={moved}", more])
    assert digest_of(corpus) in str(caught.value)
    assert digest_of(foreign) in str(caught.value)


def test_a_run_of_before_opens_and_says_that_nothing_was_compared(
    corpus: Corpus, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = without_digest(finished, tmp_path / "run")
    for command, more in ((evaluate, "rows=2"), (sample, "tokens=2")):
        command([f"run={old}", more])
        assert "carries no digest of its tokenizer" in capsys.readouterr().err
        command([f"run={finished}", more])
        assert "digest" not in capsys.readouterr().err
    export([f"run={old}", f"to={tmp_path}/weights", "model_type=weft"])
    assert "so " + str(tmp_path / "weights") + " carries none" in capsys.readouterr().out
    assert HubDirectory(tmp_path / "weights").tokenizer_digest is None
    # It goes on too: the digest of the dataset, which is compared, covers the tokenizer.
    overrides = corpus.overrides(old, *FEW)
    assert run_to_end(overrides) == 0
    assert "resume step 2/" in log_path(overrides).read_text()
