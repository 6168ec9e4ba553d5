"""A small corpus of source files, and one dataset prepared from it.

The data floor is imported inside the fixtures: this file loads before shape checks are in place.
"""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from data.config import DataConfig
    from data.prepare import Prepared

MakeConfig = Callable[..., "DataConfig"]


def _source(number: int) -> str:
    draw = random.Random(number)
    names = ["alpha", "beta", "gamma", "delta", "naïve", "value", "index", "total", "counter", "window"]
    lines = []
    for _ in range(draw.randint(4, 60)):
        name, other = draw.choice(names), draw.choice(names)
        lines.append(f"def {name}_{draw.randint(0, 99)}({other}):\n    if {other} > {draw.randint(0, 999)}:")
        lines.append(f"        return {other}  # {draw.choice(names)}\n\treturn self.{name}\n")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def megatron() -> ModuleType:
    """Megatron-Core's own indexed datasets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPU packages, at import; nothing here computes
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty files, two of them empty."""
    root = tmp_path_factory.mktemp("tree")
    for number in range(60):
        folder = root / f"package_{number % 7}"
        folder.mkdir(exist_ok=True)
        text = "" if number in (11, 23) else _source(number)
        (folder / f"module_{number}.py").write_text(text)
    return root


@pytest.fixture(scope="session")
def make_config(tree: Path) -> MakeConfig:
    def make(directory: Path, **changes: Any) -> "DataConfig":
        from data.config import DataConfig

        settings: dict[str, Any] = {
            "directory": str(directory),
            "sequence_length": 32,
            "corpora": {
                "code": {"kind": "code", "source": str(tree), "suffixes": [".py"]},
                "more": {"kind": "text", "source": f"{tree}/package_[123]/*.py", "weight": 0.25},
            },
            "tokenizer": {"vocab_size": 440, "train_bytes": 60_000},
            "held_out": 0.15,
            "workers": 0,
            "max_bad_documents": 0,
            "verify": False,
        }
        return DataConfig.model_validate(settings | changes)

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> "Prepared":
    """Prepared in this process in one go. Tests copy what they damage."""
    from data.prepare import prepare

    return prepare(make_config(tmp_path_factory.mktemp("dataset") / "small"), progress=False)
