"""The dataset of the training tests."""

from tests.train.conftest import corpus

__all__ = ["corpus"]
