"""What the loop reports to: log, metrics, evaluations and samples in files, Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.track.config import TrackConfig
from train.track.metrics_file import MetricsFile, read
from train.track.panels import heat_map, of_model, table, without_secrets
from train.track.run_log import RunLog, rounded
from train.track.wandb_sink import WandbSink

METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "evaluations.jsonl", "samples.jsonl"
# What is read back of a line.
METRIC_NUMBERS, EVALUATION_NUMBERS = ("loss", "lr", "grad_norm", "seconds"), ("loss", "targets")


class Tracker:
    """What rank 0 writes and shows; on other ranks every call does nothing.

    launch says where and from what this start was made, and on how many `ranks`.
    """

    def __init__(
        self,
        config: TrackConfig,
        run_dir: Path,
        run_id: str,
        run_config: Mapping[str, Any],
        launch: Mapping[str, Any],
        rank: int,
        total_steps: int,
    ) -> None:
        self._is_first, self._step, self._is_stopped = rank == 0, 0, False
        self._launch, self._router_every = launch, config.router_every
        self._metrics = MetricsFile(run_dir / METRICS)
        self._evaluations = MetricsFile(run_dir / EVALUATIONS)
        self._samples = MetricsFile(run_dir / SAMPLES)
        has_peak = bool(run_config.get("cluster", {}).get("peak_tflops"))
        self._log = RunLog(
            run_dir, total_steps, every=config.log_every, ranks=launch.get("ranks", 1), has_peak=has_peak
        )
        has_wandb = self._is_first and config.wandb != "disabled"
        shown = {**without_secrets(run_config), "launch": dict(launch)}
        self._wandb = WandbSink(config, run_dir, run_id, shown) if has_wandb else None

    def resume(self, step: int, checkpoint: Path | None = None, seconds: float = 0.0) -> None:
        """Put aside what an earlier start wrote after `step`, and begin the log of this one.

        Lines say how many steps are done again, and how many have no metrics. checkpoint is where the state
        was read from, in so many seconds. Raises StorageError.
        """
        if not self._is_first:
            return
        self._step = step
        if undone := self._metrics.truncate_after(step):
            print(f"{self._metrics.path}: {undone} lines after step {step} put aside; done again", flush=True)
        self._evaluations.truncate_after(step)
        self._samples.truncate_after(step)
        if missing := step - len({line["step"] for line in self.metrics()}):
            print(f"{self._metrics.path}: no line for {missing} of the steps up to {step}", flush=True)
        event, read_from = "start", dict[str, Any]()
        if checkpoint is not None:
            event, read_from = "resume", {"seconds": rounded(seconds), "checkpoint": checkpoint}
        self._log.start(event, step, {**read_from, **self._launch})

    def sync(self) -> None:
        """Make durable what was logged. Raises StorageError as `log`."""
        for file in (self._metrics, self._evaluations, self._samples, self._log):
            file.sync()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One training step. Raises StorageError when the metrics file cannot be written for good."""
        if not self._is_first:
            return
        self._step = step
        self._metrics.append(values)
        self._log.step(step, values)
        # Names without a panel are repeated under one; the step itself is the axis.
        self._send(step, of_model(values))

    def log_load(self, step: int, load: Tensor) -> None:
        """The tokens of each expert [layers E] in a step, shown every `track.router_every` steps."""
        if self._wandb is None or self._router_every is None or step % self._router_every or not load.numel():
            return
        relative = load / load.mean(dim=1, keepdim=True).clamp(min=torch.finfo(load.dtype).tiny)
        self._send(step, {"router/load": heat_map(relative.tolist())}, "router")

    def log_evaluation(self, step: int, values: Mapping[str, Any], seconds: float) -> None:
        """One evaluation on held-out documents. A second one of the same step replaces the first."""
        if not self._is_first:
            return
        self._evaluations.truncate_after(step - 1)
        self._evaluations.append({"step": step, **values})
        self._log.event("evaluation", step, {**values, "seconds": rounded(seconds)})
        self._send(step, {f"loss/held_out_{name}": value for name, value in values.items()}, "held_out")

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """What the model makes of a prompt at a step. A second sample of the same step replaces the first."""
        if not self._is_first:
            return
        self._samples.truncate_after(step - 1)
        self._samples.append({"step": step, "prompt": prompt, "text": text})
        columns = ("step", "prompt", "text")
        rows = [[line.get(name) for name in columns] for line in read(self._samples.path)]
        self._send(step, {"sample/text": table(columns, rows)}, "sample")

    def log_save(self, step: int, seconds: float, size: int) -> None:
        """A checkpoint of so many bytes that was committed. Raises StorageError."""
        if self._is_first:
            self._log.event("save", step, {"seconds": rounded(seconds), "bytes": size})

    def stop(self) -> None:
        """The run was asked to end before its last step; `close` says so."""
        self._is_stopped = True

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of the metrics file."""
        return read(self._metrics.path, METRIC_NUMBERS)

    def evaluations(self) -> list[dict[str, Any]]:
        """All lines of the evaluations file."""
        return read(self._evaluations.path, EVALUATION_NUMBERS)

    def close(self, error: BaseException | None = None) -> None:
        """The last line, then the last seconds of Weights & Biases, where `error` marks a failed run."""
        if not self._is_first:
            return
        for file in (self._metrics, self._evaluations, self._samples):
            file.close()
        if error is not None:
            self._log.close("fail", self._step, {"error": f"{type(error).__name__}: {error}"})
        elif self._is_stopped:
            self._log.close("stop", self._step, {"reason": "asked to stop"})
        else:
            self._log.close("end", self._step, {})
        if self._wandb is not None:
            self._wandb.close(is_failed=error is not None)

    def _send(self, step: int, values: Mapping[str, Any], kind: str = "") -> None:
        if self._wandb is not None:
            self._wandb.log({"step": step, **values}, kind)
