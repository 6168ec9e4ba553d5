"""A state worth saving, and a store to save it in."""

from pathlib import Path
from typing import Any

import torch

from train.checkpoint.storage import flatten
from train.checkpoint.store import CheckpointStore


def make_state(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(7, 5, generator=generator)
    weights[0, 0] = float("nan")
    weights[1, 1] = float("-inf")
    return {
        "model": {"w": weights, "half": torch.randn(9, generator=generator).bfloat16()},
        "optim": {
            "state": {"w": {"exp_avg": torch.randn(7, 5, generator=generator), "step": torch.tensor(9.0)}},
            "param_groups": [{"lr": seed * 0.1, "betas": (0.9, 0.95), "params": ["w"]}],
        },
        "rng": {"rank0": torch.randint(0, 256, (64,), generator=generator, dtype=torch.uint8)},
        "seen": seed,
    }  # fmt: skip


def as_bytes(state: dict[str, Any]) -> dict[str, Any]:
    flat, _ = flatten(state)
    return {
        key: value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.item()
        for key, value in flat.items()
        if isinstance(value, torch.Tensor)
    } | {key: value for key, value in flat.items() if not isinstance(value, torch.Tensor)}


def open_store(tmp_path: Path, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=keep)


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
