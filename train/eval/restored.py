"""A finished or running run, opened from its directory for reading."""

from pathlib import Path
from typing import NamedTuple

import torch

from conf.errors import ConfigError, Violation
from model.language_model import LanguageModel
from train.checkpoint.foreign_ids import Ids, compare_ids
from train.checkpoint.store import CheckpointStore
from train.config.run_config import RunConfig


class Restored(NamedTuple):
    """A model, the step of its checkpoint, and the checkpoint with the tokenizer whose ids it has learned."""

    model: LanguageModel
    step: int
    ids: Ids

    def compare(self, data: Ids) -> str | None:
        """As `compare_ids`: the line to print where the ids of `data` cannot be compared with the model's.

        Raises ConfigError for those of another tokenizer.
        """
        fix = "put the dataset back that the run was trained on, or prepare it again with that tokenizer"
        return compare_ids(self.ids, data, "run", fix)


def load_model(directory: str, config: RunConfig) -> Restored:
    """The model of the newest good checkpoint. The run may go on meanwhile.

    Raises ConfigError when there is no checkpoint yet, CheckpointError when none is usable.
    """
    model = LanguageModel(config.architecture, getattr(torch, config.precision.compute))
    model.to(getattr(torch, config.precision.parameters))
    path = Path(directory) / "checkpoints"
    store = CheckpointStore(path, keep=config.checkpoint.keep)
    loaded = store.load_latest({"model": model.state_dict()}, partial=("model",), read_only=True)
    if loaded is None:
        raise ConfigError([Violation("run", f"{path}: no checkpoint yet; wait for the first save")])
    return Restored(model, loaded.step, Ids(str(loaded.path), loaded.extra.get("tokenizer")))
