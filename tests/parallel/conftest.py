"""The datasets of whole runs.

Our own packages are imported inside: this file loads before shape checks are in place.
"""

import random
from pathlib import Path

import pytest

from tests.train.conftest import corpus

__all__ = ["corpus", "short_documents"]


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a few words and of many, so that rows and cuts hold starts of documents anywhere."""
    from data.prepare import prepare
    from tests.train.runs import WORDS, overrides_of
    from train.config.load import load_config

    root, draw = tmp_path_factory.mktemp("short"), random.Random(0)
    (root / "tree").mkdir()
    for number in range(400):
        lines = [f"{draw.choice(WORDS)} and {draw.choice(WORDS)}\n" for _ in range(draw.choice((1, 1, 2, 8)))]
        (root / "tree" / f"{number}.txt").write_text("".join(lines))
    found = load_config(overrides_of(root / "dataset", root / "tree", root / "run"), 1)
    prepare(found.data, progress=False)
    return root / "dataset"
