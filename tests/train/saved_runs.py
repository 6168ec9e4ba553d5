"""Runs as they lie on a disk, saved without training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from model.language_model import LanguageModel
from tests.architectures import random_model
from train.checkpoint.records import write_record
from train.checkpoint.run_files import CHECKPOINTS, CONFIG_FILE
from train.checkpoint.store import CheckpointStore
from train.config.load import load_config
from train.config.run_config import RunConfig


def save_run(
    overrides: Sequence[str], steps: Sequence[int] = (4,), tokenizer: str = "ab" * 32
) -> dict[int, LanguageModel]:
    """Saves a run of a config, with other random weights at each step; gives them."""
    config = load_config(overrides, 1)
    return {step: save_step(config, step, tokenizer) for step in steps}


def save_step(config: RunConfig, step: int, tokenizer: str) -> LanguageModel:
    """Saves random weights as the checkpoint of a step, its optimizer left out."""
    torch.manual_seed(step)
    model = random_model(config.architecture, getattr(torch, config.precision.parameters))
    for router in model.routers():
        router.reset_buffers()
    directory = Path(config.run.dir)
    store = CheckpointStore(directory / CHECKPOINTS, keep=9)
    store.save(step, {"model": model.state_dict()}, {"tokenizer": tokenizer})
    write_record(directory / CONFIG_FILE, config.model_dump(mode="json"))
    return model
