"""Lion: equal to its published algorithm, in checkpoints, plan, rehearsal and layouts as any optimizer."""

from pathlib import Path

import pytest
import torch
from torch import nn

from conf.errors import STOPPED
from model.count import count
from tests.closeness import relative
from tests.train.runs import metrics_of, run_to_end, spawn_ranks, wait_for_metrics
from train.config.load import load_config
from train.estimate.memory import memory_per_rank
from train.estimate.rehearsal import play, step_of
from train.optim.elementwise import Elementwise
from train.optim.optimizers.lion import LionConfig

LION = LionConfig(lr=0.02, beta1=0.9, beta2=0.99, weight_decay=0.5, clip_norm=1.0, lr_scales={})


def published(x: torch.Tensor, grads: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """Program 1 of arXiv 2302.06675, number by number."""
    out, momentum = x.clone().flatten(), torch.zeros_like(x).flatten()
    for grad in grads:
        for i, g in enumerate(grad.flatten().tolist()):
            m = momentum[i].item()
            update = 0.9 * m + (1 - 0.9) * g
            sign = (update > 0) - (update < 0)
            out[i] -= lr * (sign + decay * out[i].item())
            momentum[i] = 0.99 * m + (1 - 0.99) * g
    return out.view_as(x)


def test_equal_to_the_published_algorithm() -> None:
    parameter = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
    start, grads = parameter.detach().clone(), [torch.randn(3, 5, dtype=torch.float64) for _ in range(6)]
    optimizer = LION.build([{"params": [parameter], "weight_decay": 0.5, "lr_scale": 1.0}])
    assert isinstance(optimizer, Elementwise)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    assert relative(parameter.detach(), published(start, grads, 0.02, 0.5)) < 1e-14
    assert set(optimizer.state[parameter]) == {"exp_avg"}


def keys(steps: int = 12) -> list[str]:
    return ["optim=lion", f"train.steps={steps}", "precision=fp64", "residual.dropout=0.0", "optim.lr=0.001"]


def test_stopped_sharded_and_in_a_pipeline_a_run_is_the_same(corpus, tmp_path: Path) -> None:
    assert run_to_end(corpus.overrides(tmp_path / "alone", *keys())) == 0
    expected = [line["loss"] for line in metrics_of(tmp_path / "alone")]
    assert len(set(expected)) == len(expected) == 12
    # Two ranks are asked to stop after a step; four with a pipeline go on from their checkpoint.
    stopped = corpus.overrides(tmp_path / "stopped", *keys(), "checkpoint.every=1000")
    ranks = spawn_ranks(stopped, 2)
    wait_for_metrics(tmp_path / "stopped", ranks)
    (tmp_path / "stopped" / "PREEMPT").touch()
    for process in ranks:
        process.join(60)
        assert process.exitcode == STOPPED
    assert run_to_end([*stopped, "parallel.pp=2", "train.micro_batch=1", "parallel.ep=2"], 4) == 0
    found = [line["loss"] for line in metrics_of(tmp_path / "stopped")]
    assert found == pytest.approx(expected, rel=1e-12)


def test_plan_and_rehearsal_know_its_state() -> None:
    plans = {name: memory_per_rank(load_config([f"optim={name}"], 2), 2) for name in ("adamw", "lion")}
    assert plans["lion"].optimizer * 2 == plans["adamw"].optimizer == 2 * plans["adamw"].weights
    config = load_config(["optim=lion", "data.sequence_length=64"], 2)
    held = step_of(config, 0, 2)["bytes"]["total"]
    assert held["optimizer"] == held["parameters"]
    found = [play(config, rank, 2) for rank in range(2)]
    saved = sum(rank["checkpoint"]["bytes"] for rank in found)
    # Weights and momentum once each, in float32; every rank adds its random state and the expert biases.
    whole = 2 * 4 * count(config.architecture).total
    others = torch.get_rng_state().numel() + 4 * config.model.depth * config.moe.num_choices
    assert found[0]["checkpoint"]["whole_bytes"] == whole == saved - 2 * others
    assert not any(rank["checkpoint"]["problems"] for rank in found)
