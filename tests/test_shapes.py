"""The shape checks of the suite see what they should see, and nothing breaks under them."""

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError, install_import_hook
from pydantic import ValidationError

from tests import shapes

MODULE = """
from dataclasses import dataclass
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from conf.compose import Config


class Width(Config):
    width: int = Field(gt=0)
    scale: float = 1.0

    @field_validator("width")
    @classmethod
    def _even(cls, width: int) -> int:
        if width % 2:
            raise ValueError("must be even")
        return width

    @model_validator(mode="after")
    def _fits(self) -> "Width":
        return self

    def build(self, layer: int) -> "Layer":
        return Layer(self)


class Layer(nn.Module):
    def __init__(self, config: Width) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.linear(x)


@dataclass(frozen=True, slots=True)
class Sequence:
    positions: Float[Tensor, "B T"]


def matmul(a: Float[Tensor, "B T D"], b: Float[Tensor, "B D F"], scale: float) -> Float[Tensor, "B T F"]:
    return a @ b * scale
"""


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "shapes_sample.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with install_import_hook("shapes_sample", "tests.shapes.check"):
        yield importlib.import_module("shapes_sample")
    del sys.modules["shapes_sample"]


def test_a_wrong_shape_is_refused(sample: ModuleType) -> None:
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    assert sample.matmul(a, b, 1).shape == (2, 3, 5)  # an int where a float is asked for
    with pytest.raises(TypeCheckError, match=r"parameter .b."):
        sample.matmul(a, torch.zeros(2, 3, 5), 1.0)
    with pytest.raises(TypeCheckError):
        sample.Sequence(torch.zeros(3))
    with pytest.raises(TypeCheckError):
        sample.Width(width=4).build(0)(torch.zeros(2, 4))


def test_config_classes_work_as_without_the_check(sample: ModuleType) -> None:
    config = sample.Width(width=4, scale=0.5)
    assert config.build(0)(torch.zeros(1, 2, 4)).shape == (1, 2, 4)
    assert config.model_copy(update={"scale": 2.0}).scale == 2.0
    for wrong in ({"width": 3}, {"width": -2}, {"width": "4"}, {"width": 4, "depth": 1}):
        with pytest.raises(ValidationError):
            sample.Width(**wrong)
    with pytest.raises(ValidationError):
        config.width = 6
    assert dataclasses.is_dataclass(sample.Sequence)


def test_modules_with_kernels_or_without_shapes_load_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {
        "with_kernel": "import triton\n\n@triton.jit\ndef kernel(x): ...\n\nX = 'Float[Tensor, \"T\"]'\n",
        "without": "def plain(x: int): ...\n",
        "with_shape": "def shaped(x: 'Float[Tensor, \"T\"]'): ...\n",
    }
    monkeypatch.setattr(shapes, "CHECKED", tuple(modules))
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    finder = shapes.Unchecked()
    assert finder.find_spec("with_kernel", None) is not None
    assert finder.find_spec("without", None) is not None
    assert finder.find_spec("with_shape", None) is None
    assert finder.find_spec("json", None) is None
