"""A finished or running run, opened from its directory for reading."""

from pathlib import Path

import torch

from conf.errors import ConfigError, Violation
from model.language_model import LanguageModel
from train.checkpoint.store import CheckpointStore
from train.config.run_config import RunConfig


def load_model(directory: str, config: RunConfig) -> tuple[LanguageModel, int]:
    """The model of the newest good checkpoint, and its step. The run may go on meanwhile.

    Raises ConfigError when there is no checkpoint yet, CheckpointError when none is usable.
    """
    model = LanguageModel(config.architecture, getattr(torch, config.precision.compute))
    model.to(getattr(torch, config.precision.parameters))
    path = Path(directory) / "checkpoints"
    store = CheckpointStore(path, keep=config.checkpoint.keep)
    loaded = store.load_latest({"model": model.state_dict()}, partial=("model",), read_only=True)
    if loaded is None:
        raise ConfigError([Violation("run", f"{path}: no checkpoint yet; wait for the first save")])
    return model, loaded.step
