"""Whole runs of `python -m train` in float64, and how far float32 or bfloat16 may be from them."""

import json
import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.hf.pretrained import save_pretrained
from tests.architectures import random_model
from tests.closeness import distance, moved_by
from tests.parallel.truth import TURNS, Kinds, Truth, as_tensor
from tests.train.runs import log_path, metrics_of, model_of, run_to_end
from train.config.load import load_config

# Gives the overrides of a run in a directory, with more keys.
Overrides = Callable[..., list[str]]


class TrueCommand(NamedTuple):
    """What float64 gives on one process, and the key that other runs need to begin from the same weights."""

    samples: list[str]
    truth: Truth
    start: str

    def check(self, directory: Path, said: object = "") -> None:
        """Raises AssertionError where a run saw other samples, or is farther off than rounding takes it."""
        assert samples_of(directory) == self.samples, said
        self.truth.check(kinds_of(directory), said)

    def apart(self, directory: Path) -> dict[str, float]:
        """How far a run is from the truth in each kind, over all steps or all weights."""
        found = kinds_of(directory)
        return {
            kind: math.hypot(*(distance(found[kind][name], x) for name, x in true.items()))
            for kind, true in self.truth.kinds.items()
        }


def true_commands(root: Path, overrides: Overrides, dtypes: Iterable[torch.dtype]) -> list[TrueCommand]:
    """The truth of runs of the overrides, for each dtype of computation."""
    torch.manual_seed(0)
    config = load_config(overrides(root / "none"), 1)
    model = random_model(config.architecture, torch.float32)
    save_pretrained(model, root / "given", model_type="weft")
    kinds, found = {}, []
    for dtype in dtypes:
        for turn in TURNS:
            name = "given" if turn is None else f"{dtype} {turn}"
            if turn is not None:
                save_pretrained(moved(model, dtype, turn), root / name, model_type="weft")
            if name not in kinds:
                keys = overrides(root / f"run {name}", "precision=fp64", f"train.start={root / name}")
                assert run_to_end(keys) == 0, log_path(keys).read_text()
                kinds[name] = kinds_of(root / f"run {name}")
        turns = [kinds["given" if turn is None else f"{dtype} {turn}"] for turn in TURNS]
        samples = samples_of(root / "run given")
        found.append(TrueCommand(samples, Truth.of(turns, dtype), f"train.start={root / 'given'}"))
    return found


def moved(model: Any, dtype: torch.dtype, draw: int) -> Any:
    """A copy in float64, every weight up or down by an eps of the dtype."""
    found = deepcopy(model).double()
    weights = list(found.parameters())
    with torch.no_grad():
        for weight, other in zip(weights, moved_by(weights, torch.finfo(dtype).eps, draw), strict=True):
            weight.copy_(other)
    return found


def kinds_of(directory: Path) -> Kinds:
    """Losses and norms of all steps, held-out losses, and the last weights."""
    lines = metrics_of(directory)
    steps = {name: as_tensor(line[name] for line in lines) for name in ("loss", "grad_norm")}
    texts = (directory / "evaluations.jsonl").read_text().splitlines()
    scores = [json.loads(text) for text in texts]
    held_out = {name: as_tensor(score[name] for score in scores) for name in scores[0]}
    weights = {name: x for name, x in model_of(directory).state_dict().items() if x.is_floating_point()}
    return {"steps": steps, "held out": held_out, "weights": weights}


def samples_of(directory: Path) -> list[str]:
    """The sample ids of each step."""
    return [line["samples"] for line in metrics_of(directory)]
