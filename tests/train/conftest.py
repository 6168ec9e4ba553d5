"""One small prepared dataset for all runs.

Our own packages are imported inside: this file loads before shape checks are in place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class Corpus(NamedTuple):
    tree: Path
    dataset: Path

    def overrides(self, run_dir: Path, *more: str) -> list[str]:
        from tests.train.runs import overrides_of

        return overrides_of(self.dataset, self.tree, run_dir, *more)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    from data.prepare import prepare
    from tests.train.runs import write_tree
    from train.config.load import load_config

    root = tmp_path_factory.mktemp("corpus")
    found = Corpus(write_tree(root / "tree"), root / "dataset")
    prepare(load_config(found.overrides(root / "run"), 1).data, progress=False)
    return found


@pytest.fixture(autouse=True, scope="module")
def subnormal_numbers() -> Iterator[None]:
    """What a run sets for its whole process does not stay for the tests after it."""
    yield
    import torch

    torch.set_flush_denormal(False)
