"""All that a run is between two steps, as a checkpoint keeps it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW

from model.language_model import LanguageModel
from parallel.world import World


@dataclass
class TrainState:
    """Model, optimizer and counters. Mutated by every step.

    step counts optimizer steps, cursor sequences of the global data order, tokens predicted targets,
    skipped steps in a row without update.
    """

    model: LanguageModel
    optimizer: AdamW
    step: int = 0
    cursor: int = 0
    tokens: int = 0
    skipped: int = 0

    def tensors(self, world: World) -> dict[str, Any]:
        """Weights, expert biases, optimizer state and this rank's random state, for sharded storage."""
        random = {"cpu": torch.get_rng_state()}
        if world.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "random": {f"rank_{world.rank}_of_{world.size}": random},
        }

    def counters(self) -> dict[str, int]:
        """What is not a tensor, for the manifest."""
        return {"step": self.step, "cursor": self.cursor, "tokens": self.tokens, "skipped": self.skipped}

    def restore(self, tensors: dict[str, Any], counters: dict[str, int], world: World) -> None:
        """Takes over what was loaded into the result of `tensors`. Weights were loaded in place."""
        set_optimizer_state_dict(self.model, self.optimizer, tensors["optimizer"])
        random = tensors["random"][f"rank_{world.rank}_of_{world.size}"]
        torch.set_rng_state(random["cpu"])
        if world.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"])
        self.step, self.cursor = counters["step"], counters["cursor"]
        self.tokens, self.skipped = counters["tokens"], counters["skipped"]
