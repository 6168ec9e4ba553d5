"""What the loop reports to: metrics file, evaluations file, progress, Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.track.config import TrackConfig
from train.track.metrics_file import MetricsFile, read
from train.track.progress import Progress
from train.track.wandb_sink import WandbSink

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
# What is read back of a line.
METRIC_NUMBERS, EVALUATION_NUMBERS = ("loss", "lr", "grad_norm", "seconds"), ("loss", "targets")


class Tracker:
    """What rank 0 writes and shows; on other ranks every call does nothing."""

    def __init__(
        self,
        config: TrackConfig,
        run_dir: Path,
        run_id: str,
        run_config: Mapping[str, Any],
        rank: int,
        total_steps: int,
    ) -> None:
        self._is_first, self._total_steps = rank == 0, total_steps
        self._metrics = MetricsFile(run_dir / METRICS)
        self._evaluations = MetricsFile(run_dir / EVALUATIONS)
        self._progress: Progress | None = None
        has_wandb = self._is_first and config.wandb != "disabled"
        self._wandb = WandbSink(config, run_dir, run_id, run_config) if has_wandb else None

    def resume(self, step: int) -> None:
        """Put aside what an earlier start wrote after `step`, and start to show progress.

        Lines say how many steps are done again, and how many have no metrics.
        """
        if not self._is_first:
            return
        if undone := self._metrics.truncate_after(step):
            print(f"{self._metrics.path}: {undone} lines after step {step} put aside; done again", flush=True)
        self._evaluations.truncate_after(step)
        if missing := step - len({line["step"] for line in self.metrics()}):
            print(f"{self._metrics.path}: no line for {missing} of the steps up to {step}", flush=True)
        self._progress = Progress(self._total_steps)

    def sync(self) -> None:
        """Make durable what was logged. Raises StorageError as `log`."""
        for file in (self._metrics, self._evaluations):
            file.sync()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One training step. Raises StorageError when the metrics file cannot be written for good."""
        if not self._is_first:
            return
        self._metrics.append(values)
        if self._progress is not None:
            self._progress.update(step, values)
        self._send(values)

    def log_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """One evaluation on held-out documents. A second one of the same step replaces the first."""
        if not self._is_first:
            return
        self._evaluations.truncate_after(step - 1)
        self._evaluations.append({"step": step, **values})
        self._send({"step": step, **{f"loss/held_out_{name}": value for name, value in values.items()}})

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of the metrics file."""
        return read(self._metrics.path, METRIC_NUMBERS)

    def evaluations(self) -> list[dict[str, Any]]:
        """All lines of the evaluations file."""
        return read(self._evaluations.path, EVALUATION_NUMBERS)

    def close(self, *, is_failed: bool = False) -> None:
        """Ends the display and gives Weights & Biases its last seconds; `is_failed` is shown there."""
        for part in (self._metrics, self._evaluations, self._progress):
            if part is not None:
                part.close()
        if self._wandb is not None:
            self._wandb.close(is_failed=is_failed)

    def _send(self, values: Mapping[str, Any]) -> None:
        if self._wandb is not None:
            # Names without a panel are repeated under one; the step itself is the axis.
            self._wandb.log({name: value for name, value in values.items() if "/" in name or name == "step"})
