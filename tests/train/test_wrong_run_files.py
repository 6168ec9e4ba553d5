"""Runs with files that are damaged somewhere: refused in one line, or trained to the same end."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.damage import damage
from tests.train.conftest import Corpus
from tests.train.runs import log_path, model_of, run_to_end

pytestmark = [pytest.mark.prove]

STEPS = ("train.steps=8", "train.evaluate_every=100", "train.final_rows=1", "sample.tokens=1")
Folders = pytest.TempPathFactory


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: Folders) -> Path:
    """A run with checkpoints of steps 4 and 8."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert run_to_end(corpus.overrides(directory, *STEPS)) == 0
    return directory


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_run_is_refused_or_goes_on_to_the_same_weights(
    seed: int, corpus: Corpus, finished: Path, tmp_path_factory: Folders
) -> None:
    run, draw = tmp_path_factory.mktemp("damaged") / "run", random.Random(seed)
    shutil.copytree(finished, run)
    # As often in the files of a checkpoint as in the others.
    folder = draw.choice([run, run / "checkpoints"])
    hit = draw.sample(files_of(folder), draw.randrange(1, 4))
    whole = {path.read_bytes() for path in files_of(run / "checkpoints") if path not in hit}
    for path in hit:
        damage(path, draw)
    overrides = corpus.overrides(run, *STEPS)
    code, said = run_to_end(overrides), log_path(overrides).read_text()
    assert "Traceback" not in said
    if code:
        assert code == 66, said
        assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
    else:
        assert json.loads((run / "run.json").read_text())["step"] == 8
        newest, before = (model_of(path).state_dict() for path in (run, finished))
        torch.testing.assert_close(newest, before, rtol=0, atol=0)
    # An older one goes where a newer one is whole; none that is whole goes before.
    left = {path.read_bytes() for path in files_of(run / "checkpoints")}
    assert whole <= left, code
