"""The line of metrics.jsonl that every step makes."""

from typing import Any

import xxhash
from torch import Tensor

from data.loader import Batch
from parallel.mesh.world import World
from train.config.run_config import RunConfig
from train.eval.heldout import Evaluation
from train.loop.hooks import Saved, StepHook
from train.loop.measure import Meter
from train.loop.state import TrainState
from train.loop.step import StepResult
from train.track.tracker import Tracker


class Metrics(StepHook):
    """Clocks each step and hands its numbers to the tracker; collective."""

    def __init__(self, config: RunConfig, tracker: Tracker, world: World) -> None:
        self._tracker, self._world = tracker, world
        self._meter = Meter(config, world.device, world.size)
        self._samples = ""

    def before_data(self, state: TrainState) -> None:
        """Starts the clock."""
        self._meter.start_step()

    def before_step(self, state: TrainState, batch: Batch) -> None:
        """Notes how long the data took, and what it is."""
        self._meter.end_data()
        self._samples = digest_samples(batch, self._world)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Logs the step. Raises StorageError."""
        seconds = self._meter.end_step()
        metrics = step_metrics(state, result, self._samples, seconds)
        self._tracker.log(state.step, metrics | self._meter.readings(result.targets, seconds))
        self._tracker.log_load(state.step, result.load)

    def after_evaluation(self, state: TrainState, held_out: Evaluation, seconds: float) -> None:
        """Logs the evaluation. Raises StorageError."""
        self._tracker.log_evaluation(state.step, held_out._asdict(), seconds)

    def after_save(self, state: TrainState, saved: Saved) -> None:
        """Logs the save, and makes all lines as durable as the checkpoint. Raises StorageError."""
        self._tracker.log_save(state.step, *saved)
        self._tracker.sync()


def digest_samples(batch: Batch, world: World) -> str:
    """A digest of the sample ids of the global batch, as every rank really drew them."""
    # Ranks of one row, and stages of one pipeline, have the same rows.
    ids = world.gather(batch.sample_ids.to(world.device))
    ids = ids[: world.size // world.axes.pp.size : world.axes.sequence.size].cpu()
    return xxhash.xxh3_64_hexdigest(ids.numpy().tobytes())


def step_metrics(state: TrainState, result: StepResult, samples: str, seconds: float) -> dict[str, Any]:
    """One line of metrics.jsonl, and the panels made from it."""
    metrics: dict[str, Any] = {
        "step": state.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": state.tokens,
        "seconds": seconds,
        "samples": samples,
        "loss/cross_entropy": result.loss,
        **{f"loss/mtp_{depth}": value for depth, value in enumerate(result.mtp, 1)},
        **{f"loss/{name}": value for name, value in result.auxiliary.items()},
        "optimizer/grad_norm": result.grad_norm,
        "optimizer/lr": result.lr,
        "optimizer/skipped": int(result.is_skipped),
        "data/tokens": state.tokens,
        "data/sequences": state.cursor,
    }
    return metrics | router_metrics(result.load, result.entropy)


def router_metrics(loads: Tensor, entropies: Tensor) -> dict[str, float]:
    """Load [layers E] and entropy [layers] of the routers, of all layers together and of each one."""
    metrics: dict[str, float] = {}
    violations, idle = list[float](), list[int]()
    for layer, (load, entropy) in enumerate(zip(loads, entropies, strict=True)):
        violations.append(float(load.max() / load.mean() - 1))
        idle.append(int((load == 0).sum()))
        metrics[f"router/max_violation_{layer}"] = violations[-1]
        metrics[f"router/idle_experts_{layer}"] = idle[-1]
        metrics[f"router/entropy_{layer}"] = float(entropy)
    if not violations:
        return {}
    of_all = {
        "router/max_violation": max(violations),
        "router/mean_violation": sum(violations) / len(violations),
        "router/idle_experts": sum(idle),
        "router/entropy": float(entropies.mean()),
    }
    return of_all | metrics
