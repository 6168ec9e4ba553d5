"""Hydra's multirun: each choice is a run of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import Corpus
from train.loop.sweep import told_apart


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train", "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_every_choice_is_a_run_with_its_own_directory(corpus: Corpus, tmp_path: Path) -> None:
    ended = sweep(*corpus.overrides(tmp_path / "sweep", "train.steps=2", "optim.lr=0.01,0.002"))
    assert ended.returncode == 0, ended.stderr
    rates = {}
    for number in (0, 1):
        run = tmp_path / "sweep" / str(number)
        rates[number] = json.loads((run / "config.json").read_text())["optim"]["lr"]
        assert json.loads((run / "result.json").read_text())["steps"] == 2
    assert rates == {0: 0.01, 1: 0.002}


def test_all_typos_in_a_sweep_are_named(corpus: Corpus, tmp_path: Path) -> None:
    wrong = ("train.steps=-1", "optim.lrr=0.01,0.002", "modle.width=8")
    ended = sweep(*corpus.overrides(tmp_path / "sweep", *wrong))
    assert ended.returncode == 64, ended.stderr
    for said in ("train.steps: ", "did you mean optim.lr?", "did you mean model?"):
        assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "sweep").exists()


def test_an_unknown_option_in_a_sweep_is_named() -> None:
    ended = sweep("optim=adamw,lyon", "optim.lr=1e-3,3e-3")
    assert ended.returncode == 64, ended.stderr
    assert "did you mean lion?" in ended.stderr


def test_flags_keep_the_words_that_belong_to_them() -> None:
    flags, typed = told_apart(["--cfg", "job", "recipe=smoke", "-m", "optim.lr=1,2"])
    assert flags == ["--cfg", "job", "-m"]
    assert typed == ["recipe=smoke", "optim.lr=1,2"]
