"""Every test starts from its own seed, on one thread, with the shapes in signatures checked."""

import gc
import hashlib
import random
import sys
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from tests import shapes

hypothesis.settings.register_profile(
    "weft",
    deadline=None,  # the machine is shared; a slow example is not a wrong one
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("weft")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-shapes", action="store_true", help="run without shape checks (torch.compile)")
    parser.addoption("--seed", type=int, default=0, help="shift the seed of every test")
    parser.addoption("--threads", type=int, default=1, help="threads of every operation of torch")
    parser.addoption("--no-onednn", action="store_true", help="multiply matrices without oneDNN")


# Files of the first start first: theirs are long tests, and where one is last the other process waits for it.
LONGEST_FIRST = ("parallel", "train", "slurm", "model", "contracts", "kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        folders = item.path.parts
        return next((n for n, name in enumerate(LONGEST_FIRST) if name in folders), len(LONGEST_FIRST))

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    # All modules are there: no later collection reads them again.
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    # With fla to be found transformers would pick kernels that cannot run without a GPU, in whichever test
    # imports a model first.
    sys.modules.setdefault("fla", None)  # pyright: ignore[reportArgumentType]
    # Small shapes on few cores: more threads would only take turns.
    torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--no-onednn"):
        torch.backends.mkldnn.set_flags(False)
    if not config.getoption("--no-shapes"):
        shapes.check_imports()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    # From the test's name and not from the order of tests: one test alone behaves as in the full suite.
    name = f"{request.node.nodeid}:{request.config.getoption('--seed')}"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
